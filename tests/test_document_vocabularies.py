"""Documents whose outputs have tokens, templates, statistics or experts of their own: the bytes of separate merges."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import MemoryLimitError, merge, plan
from raymerge.ops.registry import find_op
from tests import mixtures
from tests.checkpoints import read_files
from tests.statistics import write_statistics
from tests.steps import Documents, check_same, entries, write
from tests.tokenized_models import TEXTS, byte_level, write_family, write_tokenized

UNION = {"tokenizer_source": "union"}
PADDED = {"tokenizer": {"source": "union", "pad_to_multiple_of": 64}}


def slerp(*names: str, **keys: Any) -> dict[str, Any]:
    base, *others = names
    return {
        "merge_method": "slerp", "base_model": base, "models": entries(*others), "parameters": {"t": 0.3}, **keys,
    }  # fmt: skip


def ties(*names: str, **keys: Any) -> dict[str, Any]:
    base, *others = names
    weights, densities = [1, 0.5, 0.25][: len(others)], [0.4, 0.7, 0.5][: len(others)]
    models = entries(*others, weight=weights, density=densities)
    return {"merge_method": "ties", "base_model": base, "models": models, **keys}


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three tiny models whose tokenizers differ, and a fourth with rows beyond its own; in the current directory."""
    monkeypatch.chdir(tmp_path)
    family = [path.name for path in write_family(tmp_path, dtype=torch.bfloat16)]
    write_tokenized(tmp_path / "d", 3, byte_level(TEXTS[0], 280), more_rows=10, dtype=torch.bfloat16)
    return [*family, "d"]


TOKENS = {"<s>": {"source": "b", "force": True}, "<new>": {"source": {"kind": "zero"}}}
COPIED: dict[str, Any] = {"merge_method": "passthrough", "models": entries("d")}
CASES: dict[str, Documents] = {
    "unions": {"one": ties("a", "b", **UNION), "last": slerp("one", "c", **UNION)},
    "a base without all tokens": {"one": ties("a", "b", **UNION), "last": slerp("c", "one", **UNION)},
    "fewer tokens": {"one": slerp("a", "b", **UNION), "last": ties("one", "c", "d", tokenizer_source="d")},
    "rows beyond": {"one": COPIED, "last": slerp("one", "a", tokenizer_source="base")},
    "padding": {
        "one": ties("a", "b", **PADDED),
        "two": slerp("one", "c", **PADDED),
        "last": ties("two", "d", **PADDED),
    },
    "chosen tokens": {
        "one": slerp("a", "b", tokenizer={"source": "b", "tokens": TOKENS}, chat_template="chatml", dtype="float32"),
        "last": ties("c", "one", tokenizer={"source": "one"}, chat_template="auto", out_dtype="float16"),
    },
    "a tokenizer alone": {"one": slerp("b", "c", **UNION), "last": slerp("a", "d", tokenizer_source="one")},
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("unions", "rows beyond") else pytest.param(name, marks=pytest.mark.slow) for name in CASES],
)
def test_tokens_of_their_own(name: str, models: list[str]) -> None:
    check_same(CASES[name])


def test_plans_tell_what_is_in_between(models: list[str]) -> None:
    documents = {"one": ties("a", "b", **UNION, chat_template="chatml"), "last": slerp("one", "c", **UNION)}
    made = plan(write(documents))
    assert made.notes == ("one: chat_template: chatml",)
    assert any(line.startswith("c: ") and " of one" in line for line in made.vocabulary)


@pytest.mark.parametrize("method", ["fisher", "regmean"])
def test_statistics(method: str, models: list[str]) -> None:
    """Those of a document's own models, and those of another document's output."""
    op = find_op(method)
    write_tokenized(Path("b"), 1, byte_level(TEXTS[0], 280), more_rows=11, dtype=torch.bfloat16)
    write_tokenized(Path("a"), 2, byte_level(TEXTS[0], 280), more_rows=11, dtype=torch.bfloat16)
    write_tokenized(Path("one"), 2, byte_level(TEXTS[0], 280), more_rows=11)

    def of(*names: str) -> dict[str, Any]:
        given = [{"model": name, **write_statistics(op, name)} for name in names]
        return {"merge_method": method, "models": given}

    last = of("one", "a")
    for path in Path("one").iterdir():
        path.unlink()
    Path("one").rmdir()
    check_same({"one": of("a", "b"), "last": last})


def test_mixtures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of another document's output, its base among them, and in another document."""
    monkeypatch.chdir(tmp_path)
    mixtures.write_family(tmp_path, "llama", 3, torch.bfloat16)
    documents = {
        "one": ties("llama0", "llama1", **UNION),
        "two": mixtures.make_config(["one", "llama2", "one"], gate_mode="cheap_embed"),
        "last": slerp("two", "three"),
    }
    mix = mixtures.make_config(["llama0", "llama2", "llama1"])
    check_same({"one": documents["one"], "two": documents["two"], "three": mix, "last": documents["last"]})
    merge("merge.yml", "fused")  # is complete: what a run computes is not part of its plan's fingerprint


@pytest.mark.slow
def test_a_mixture_of_hidden_states(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    mixtures.write_family(tmp_path, "llama", 3, torch.bfloat16)
    mix = mixtures.make_config(["one", "llama2", "one"], gate_mode="hidden")
    check_same({"one": ties("llama0", "llama1"), "two": mix, "last": {**COPIED, "models": entries("two")}})


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(12))
def test_documents_at_random(seed: int, models: list[str]) -> None:
    rng = random.Random(seed)
    documents: dict[str, dict[str, Any]] = {}
    for name in ("one", "two", "three", "last")[rng.randrange(3) :]:
        used = [*documents][-1:]
        chosen = [*used, *rng.sample(models, 3 - len(used))]
        rng.shuffle(chosen)
        document = rng.choice((slerp, ties))(*chosen[: 2 + rng.randrange(2)])
        if document["merge_method"] == "slerp":
            document["models"] = document["models"][:1]
        there = [document["base_model"], *(entry["model"] for entry in document["models"])]
        if used and used[0] not in there:
            document["base_model"] = used[0]
        source = rng.choice(["union", "union", "base", there[-1], rng.choice(models)])
        document["tokenizer"] = {"source": source, "pad_to_multiple_of": rng.choice([1, 1, 16])}
        documents[name] = document | rng.choice([{}, {"chat_template": "auto"}, {"dtype": "float16"}])
    check_same(documents)


@pytest.mark.slow
def test_many_blocks_of_scattered_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window has a share of the blocks of a document's output, and those rows of it that others lack are kept."""
    monkeypatch.chdir(tmp_path)
    rng = random.Random(0)
    for seed, name in enumerate("abc"):
        tokenizer = byte_level(TEXTS[0], 270)
        words = [f"w{k}" for k in range(300 * seed, 300 * seed + 700)]
        rng.shuffle(words)
        tokenizer.add_tokens(words)
        write_tokenized(tmp_path / name, seed, tokenizer, width=264, dtype=torch.bfloat16)
    documents = {"one": ties("a", "b", **PADDED), "last": ties("c", "one", "a", **PADDED)}
    with pytest.raises(MemoryLimitError, match="the smallest limit that works is --memory") as caught:
        plan(write(documents), memory="1MiB", workers=1)
    least = str(caught.value).rsplit(" ", 1)[-1]
    check_same(documents, memory=least, workers=1)
    assert sum(task.reread_nbytes for task in plan("merge.yml", memory=least, workers=1).tasks) > 0
    assert not any(task.reread_nbytes for task in plan("merge.yml", memory="1GiB", workers=1).tasks)
    merge("merge.yml", "resident", workers=2)
    assert read_files(Path("resident")) == read_files(Path("fused"))
