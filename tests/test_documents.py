"""Several documents in one config: the bytes of separate merges, with nothing written in between."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raymerge import merge, plan
from raymerge.pipeline.errors import ConfigError
from tests.checkpoints import read_files, read_tensors, write_family
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

Documents = Mapping[str, dict[str, Any]]
"""By name; the last one is the output, and has none in the file."""


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and three fine-tunes, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return [path.name for path in write_family(tmp_path, 3, dtype=torch.bfloat16, num_layers=3)]


def write(documents: Documents, file: str = "merge.yml") -> str:
    *steps, (_, last) = documents.items()
    parts = [{"name": name, **document} for name, document in steps]
    Path(file).write_text("---\n".join(yaml.safe_dump(part, sort_keys=False) for part in [*parts, last]))
    return file


def merge_separately(documents: Documents, **options: Any) -> Path:
    """Merge one document after the other, each into a directory of its name; return the last one's."""
    for name, document in documents.items():
        merge(document, name, workers=1, **options)
    return Path([*documents][-1])


def check_same(documents: Documents, **options: Any) -> None:
    merge(write(documents), "fused", **options)
    expected = read_tensors(merge_separately(documents))
    found = read_tensors(Path("fused"))
    assert found.keys() == expected.keys()
    different = [name for name in expected if not torch.equal(found[name], expected[name])]
    assert different == []
    config = [(Path(out) / "config.json").read_text() for out in ("fused", [*documents][-1])]
    assert config[0] == config[1]


def entries(*names: str, **parameters: list[Any]) -> list[dict[str, Any]]:
    """Return entries of models, each with its value of each parameter."""
    return [
        {"model": name, "parameters": {key: values[k] for key, values in parameters.items()}}
        for k, name in enumerate(names)
    ]


def source(name: str, start: int, stop: int) -> dict[str, Any]:
    return {"sources": [{"model": name, "layer_range": [start, stop]}]}


STEPS: dict[str, Any] = {
    "linear": {"merge_method": "linear", "models": entries("tuned1", "tuned2", weight=[0.3, 0.7])},
    "nuslerp": {"merge_method": "nuslerp", "models": entries("tuned1", "tuned2", weight=[0.4, 0.6])},
    "ties": {
        "merge_method": "ties",
        "base_model": "base",
        "models": entries("tuned1", "tuned2", weight=[1, 0.5], density=[0.4, 0.7]),
        "out_dtype": "float16",
    },
    "della": {
        "merge_method": "della",
        "base_model": "base",
        "models": entries("tuned1", "tuned2", weight=[1, 0.5], density=[0.4, 0.7]),
        "dtype": "float32",
    },
    "sce": {"merge_method": "sce", "base_model": "base", "models": entries("tuned1", "tuned2")},
}


@pytest.mark.parametrize(
    ("step", "last"),
    [("nuslerp", "ties"), ("ties", "slerp")]
    + [
        pytest.param(step, last, marks=pytest.mark.slow)
        for step in STEPS
        for last in ("slerp", "ties", "della")
        if (step, last) not in (("nuslerp", "ties"), ("ties", "slerp"))
    ],
)
def test_the_bytes_of_separate_merges(step: str, last: str, models: list[str]) -> None:
    final = {
        "slerp": {
            "merge_method": "slerp",
            "base_model": "first",
            "models": entries("tuned3"),
            "parameters": {"t": 0.3},
        },
        "ties": {**STEPS["ties"], "models": entries("first", "tuned3", weight=[1, 1], density=[0.5, 0.5])},
        "della": {**STEPS["della"], "models": entries("first", "tuned3", weight=[1, 1], density=[0.5, 0.5])},
    }[last]
    check_same({"first": STEPS[step], "last": final})


def test_steps_of_steps_and_stacked_layers(models: list[str]) -> None:
    documents = {
        "one": STEPS["nuslerp"],
        "two": {"merge_method": "slerp", "base_model": "one", "models": entries("tuned3"), "parameters": {"t": 0.2}},
        "three": {"merge_method": "linear", "models": entries("one", "two", weight=[1, 2]), "dtype": "float32"},
        "last": {
            "merge_method": "passthrough",
            "dtype": "bfloat16",
            "slices": [source("three", 0, 2), source("tuned1", 1, 3), source("two", 2, 3)],
        },
    }
    check_same(documents, workers=2)
    made = plan("merge.yml")
    assert [str(model) for model in made.models] == ["tuned1", "tuned2", "tuned3"]
    assert str(made.donor) == "three"
    assert "three: 9 tensors" in "".join(line for line in made.dropped if "layers in no slice" in line)


def test_what_others_use_is_written_if_that_is_wanted(models: list[str]) -> None:
    documents = {
        "one": STEPS["nuslerp"],
        "two": {"merge_method": "slerp", "models": entries("one", "tuned3"), "parameters": {"t": 0.2}},
        "last": {"merge_method": "linear", "models": entries("one", "two", weight=[1, 2])},
    }
    merge(write(documents), "fused", workers=1, keep_intermediates="kept")
    merge_separately(documents)
    for name in ("one", "two"):
        found, expected = read_tensors(Path("kept") / name), read_tensors(Path(name))
        assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert read_tensors(Path("fused")).keys() == read_tensors(Path("last")).keys()
    with pytest.raises(ConfigError, match=r"merge.yml:1: name: '\.\./one' is to be the name of a directory"):
        plan(write({f"../{name}" if name == "one" else name: document for name, document in documents.items()}))


@pytest.mark.parametrize(
    ("used", "out", "problem"),
    [
        ("tuned3", "kept/one", "the output kept/one is given twice"),
        ("tuned3", "kept/one/last", "kept/one/last lies in kept/one, which is made after it"),
        ("kept/one", "out", "the output .*/kept/one and the input .*/kept/one overlap"),
    ],
)
def test_what_others_use_replaces_no_output_and_no_input(
    used: str, out: str, problem: str, models: list[str], tmp_path: Path
) -> None:
    """Nor is it found after the last document is merged."""
    if used not in models:
        (tmp_path / "kept").mkdir()
        (tmp_path / "tuned3").rename(tmp_path / used)
    before = read_files(tmp_path)
    last = {"merge_method": "slerp", "models": entries("one", used), "parameters": {"t": 0.2}}
    file = write({"one": STEPS["nuslerp"], "last": last}, str(tmp_path.parent / "merge.yml"))
    with pytest.raises(ConfigError, match=problem):
        merge(file, out, workers=1, keep_intermediates="kept", overwrite=True)
    assert read_files(tmp_path) == before


def test_a_tokenizer_that_all_models_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows beyond it are left out, in every document."""
    monkeypatch.chdir(tmp_path)
    tokenizer = byte_level(TEXTS[0], 270)
    for seed, name in enumerate("abc"):
        write_tokenized(tmp_path / name, seed, tokenizer, more_rows=10)
    documents: dict[str, dict[str, Any]] = {
        "one": {"merge_method": "nuslerp", "models": entries("a", "b", weight=[1, 2]), "tokenizer_source": "union"},
        "last": {
            "merge_method": "slerp",
            "base_model": "one",
            "models": entries("c"),
            "parameters": {"t": 0.3},
            "tokenizer": {"source": "base"},
        },
    }
    check_same(documents)
    assert read_tensors(Path("fused"))["lm_head.weight"].shape[0] == 270
    rule = documents["one"].pop("tokenizer_source")
    with pytest.raises(
        ConfigError, match=r"one: the tokenizer .* and rows beyond these, give it the same `tokenizer`;"
    ):
        plan(write(documents))
    documents["one"] |= {"tokenizer_source": rule, "chat_template": "chatml"}
    assert plan(write(documents)).warnings == (
        "one: chat_template: not in the output, because others use this document; write it in the last",
    )
    tokenizer.add_special_tokens(["<|im_start|>"])
    write_tokenized(tmp_path / "b", 1, tokenizer)
    with pytest.raises(ConfigError, match=r"^one: tokenizer_source gives tokens or rows that a does not"):
        plan("merge.yml")


@pytest.mark.slow
@pytest.mark.parametrize(("step", "vocab"), [("nuslerp", 4500), ("ties", 4500), ("della", 800)])
def test_tensors_of_many_blocks_that_are_read_once_for_each_pass(
    step: str, vocab: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of della are whole rows, and others than those of ties."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, 3, dtype=torch.bfloat16, num_layers=1, hidden=520, vocab=vocab)
    last = {**STEPS["ties"], "models": entries("first", "tuned3", weight=[1, 1], density=[0.5, 0.5])}
    check_same({"first": STEPS[step], "last": last}, memory="38MiB", workers=1)
    assert sum(task.reread_nbytes for task in plan("merge.yml", memory="38MiB", workers=1).tasks) > 0
    merge("merge.yml", "resident", workers=2)
    assert read_files(Path("resident")) == read_files(Path("fused"))
