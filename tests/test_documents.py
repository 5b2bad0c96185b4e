"""Several documents in one config: the bytes of separate merges, with nothing written in between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.plan.memory import projection
from tests.checkpoints import read_files, read_tensors, write_family
from tests.steps import check_same, entries, merge_separately, write


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A tiny model and three fine-tunes, in the current directory."""
    monkeypatch.chdir(tmp_path)
    return [path.name for path in write_family(tmp_path, 3, dtype=torch.bfloat16, num_layers=3)]


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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "vocab", "memory"), [("nuslerp", 4500, "38MiB"), ("ties", 9000, "44MiB"), ("della", 1500, "51MiB")]
)
def test_tensors_of_many_blocks_that_are_read_once_for_each_pass(
    step: str, vocab: int, memory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The blocks of della are whole rows, and others than those of ties."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, 3, dtype=torch.bfloat16, num_layers=1, hidden=520, vocab=vocab)
    last = {**STEPS["ties"], "models": entries("first", "tuned3", weight=[1, 1], density=[0.5, 0.5])}
    check_same({"first": STEPS[step], "last": last}, memory=memory, workers=1)
    tasks = plan("merge.yml", memory=memory, workers=1).tasks
    assert sum(task.reread_nbytes for task in tasks) > 0
    report = merge("merge.yml", "again", memory=memory, workers=1)
    assert report.read_nbytes == sum(task.read_nbytes + task.reread_nbytes for task in tasks)
    merge("merge.yml", "resident", workers=2)
    assert read_files(Path("resident")) == read_files(Path("fused"))


def test_passes_before_the_values_on_the_way_read_what_they_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes over five models: those of the first document, then those of the second, then all."""
    monkeypatch.chdir(tmp_path)
    write_family(tmp_path, 4, dtype=torch.bfloat16, num_layers=1, hidden=264, vocab=3000)
    slerp: dict[str, Any] = {"merge_method": "slerp", "parameters": {"t": 0.4}}
    documents = {
        "one": {**slerp, "base_model": "base", "models": entries("tuned1")},
        "two": {**slerp, "base_model": "one", "models": entries("tuned2")},
        "three": {"merge_method": "linear", "models": entries("two", "tuned3", weight=[1, 2])},
        "last": {**slerp, "base_model": "three", "models": entries("tuned4")},
    }
    check_same(documents, memory="34MiB", workers=1)
    tasks = plan("merge.yml", memory="34MiB", workers=1).tasks
    assert all(task.reread_nbytes for task in tasks)
    report = merge("merge.yml", "again", memory="34MiB", workers=1)
    assert report.read_nbytes == sum(task.read_nbytes + task.reread_nbytes for task in tasks)
    assert all(task.spared_nbytes for task in tasks)
    monkeypatch.setattr(projection, "MAX_FETCH_NBYTES", 2**20)  # of larger tensors, the page cache keeps the sources
    tasks = plan("merge.yml", memory="34MiB", workers=1).tasks
    assert all(task.reread_nbytes for task in tasks)
    assert not any(task.spared_nbytes for task in tasks)
