"""Vocabularies of every kind, token by token against mergekit 0.1.5 in a process and an environment of its own.

`make test-mergekit` installs it and runs this.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import AddedToken, Tokenizer

from raymerge import merge
from tests.checkpoints import read_tensors
from tests.tokenized_models import KINDS, TEXTS, draw_lines, read_vocab, write_large_pair, write_tokenized

PEER = Path(os.environ.get("RAYMERGE_MERGEKIT", ".venv-mergekit/bin/mergekit-multi"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEER.exists(), reason=f"{PEER} is not there")]

ROUNDING = 2.0**-21
SUMS = 1e-6
UNION: dict[str, Any] = {"tokenizer_source": "union"}
ROWS = ("model.embed_tokens.weight", "lm_head.weight")


def list_cases(home: Path) -> dict[str, tuple[dict[str, Any], float]]:
    """Return configs and bounds; a is the base, and d is a with rows of padding."""
    a, b, c, d = (str(home / name) for name in "abcd")

    def of(method: str, models: str, **more: Any) -> dict[str, Any]:
        weights = dict(zip(models, (0.5, 0.25, -0.5), strict=False))
        entries = [{"model": str(home / m), "parameters": {"weight": weight}} for m, weight in weights.items()]
        return {"merge_method": method, "models": entries, "dtype": "float32", **more}

    plain = {"parameters": {"normalize": False}}
    tokens = {
        "<|im_start|>": {"source": {"kind": "zero"}},
        "<|im_end|>": {"source": b},
        "<new>": {"source": {"kind": "model_token", "model": b, "token": "foo bar"}},
        "<s>": {"source": b, "force": True},
        "</s>": {"source": {"kind": "model_token", "model": b, "token_id": 9}, "force": True},
    }
    stack = [{"sources": [{"model": model, "layer_range": [0, 2]}]} for model in (a, b)]
    pair = [{"model": model, "layer_range": [0, 2]} for model in (a, b)]
    return {
        "linear-union": (of("linear", "abc", base_model=a, **UNION, **plain), ROUNDING),
        "linear-no-base": (of("linear", "bc", **plain, tokenizer_source=b), ROUNDING),
        "linear-base": (of("linear", "abc", base_model=a, tokenizer_source="base", **plain), ROUNDING),
        "linear-other": (of("linear", "abc", base_model=a, tokenizer_source=c, **plain), ROUNDING),
        "stranger": (of("linear", "ab", base_model=a, tokenizer_source=c, **plain), ROUNDING),
        "padded": (of("linear", "da", base_model=d, tokenizer={}, **plain), ROUNDING),
        "multiple": (
            of("linear", "ab", base_model=a, tokenizer={"source": "base", "pad_to_multiple_of": 64}, **plain), SUMS,
        ),
        "tokens": (of("linear", "ab", base_model=a, tokenizer={"tokens": tokens}, **plain), ROUNDING),
        "task": (of("task_arithmetic", "bc", base_model=a, **UNION), ROUNDING),
        "ties": (of("ties", "bc", base_model=a, **UNION, parameters={"density": 0.4}), ROUNDING),
        "stock": (of("model_stock", "bc", base_model=a, **UNION), SUMS),
        "multislerp": (of("multislerp", "ab", tokenizer_source=a), SUMS),
        "slerp": (
            {"merge_method": "slerp", "base_model": a, "slices": [{"sources": pair}], "parameters": {"t": 0.4},
             "dtype": "float32", **UNION}, SUMS,
        ),
        "stack": (
            {"merge_method": "passthrough", "base_model": a, "slices": stack, "dtype": "float32", **UNION}, ROUNDING,
        ),
    }  # fmt: skip


CASES = [("byte-level BPE", name) for name in list_cases(Path())]
CASES += [(kind, name) for kind in KINDS if kind != CASES[0][0] for name in ("linear-union", "tokens", "stack")]


@pytest.fixture(scope="module")
def find_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that has mergekit merge models with a kind of tokenizer, once, and returns where they are."""
    return cache(lambda kind: make_home(tmp_path_factory.mktemp("home"), kind))


def make_home(home: Path, kind: str) -> Path:
    first, second, third = (KINDS[kind](text) for text in TEXTS)
    first.add_special_tokens(["<pad>"])
    second.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    second.add_tokens(["foo bar"])
    third.add_special_tokens(["<|im_start|>"])
    third.add_tokens([AddedToken("<pad>", lstrip=True)])
    for seed, (name, tokenizer) in enumerate(zip("abcd", (first, second, third, first), strict=True)):
        dtype = torch.bfloat16 if name == "b" else torch.float32
        write_tokenized(home / name, seed, tokenizer, more_rows=7 if name == "d" else 0, dtype=dtype)
    run_peer(home, {name: list_cases(home)[name][0] for other, name in CASES if other == kind})
    return home


def run_peer(home: Path, configs: Mapping[str, dict[str, Any]]) -> None:
    """Have mergekit make each config's merge, in `merged-NAME`."""
    documents = [{"name": f"merged-{name}", **config} for name, config in configs.items()]
    file = home / "recipe.yml"
    file.write_text("\n---\n".join(map(json.dumps, documents)))
    command = [str(PEER), str(file), "--intermediate-dir", str(home), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]


def reorder(rows: torch.Tensor, ours: Mapping[str, int], theirs: Mapping[str, int]) -> torch.Tensor:
    """Return rows in the order of another numbering of the same tokens."""
    order = torch.arange(len(rows))
    for token, number in ours.items():
        order[number] = theirs[token]
    return rows[order]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_same_tokens_and_rows(kind: str, name: str, find_home: Callable[[str], Path], tmp_path: Path) -> None:
    home = find_home(kind)
    config, bound = list_cases(home)[name]
    out, peer = tmp_path / "out", home / f"merged-{name}"
    merge(config, str(out), workers=1)
    check_rows(out, peer, bound)
    check_texts(out, peer, list_lines(10_000))


def test_large_vocabularies(tmp_path: Path) -> None:
    words = write_large_pair(tmp_path)
    config = list_cases(tmp_path)["linear-union"][0]
    config["models"] = config["models"][:2]
    run_peer(tmp_path, {"large": config})
    out, peer = tmp_path / "out", tmp_path / "merged-large"
    merge(config, str(out), workers=1)
    assert len(read_vocab(out)) > 150_000
    check_rows(out, peer, ROUNDING)
    check_texts(out, peer, [*draw_lines(10_000, words, 0), *list_lines(2000)])
    base, merged = (json.loads((model / "tokenizer.json").read_text())["model"] for model in (tmp_path / "a", out))
    assert merged == base


def check_rows(out: Path, peer: Path, bound: float) -> None:
    """Compare the tokens of two outputs, and each of their tensors, rows by token."""
    vocab, of_peer = read_vocab(out), read_vocab(peer)
    assert vocab.keys() == of_peer.keys()
    ours, theirs = read_tensors(out), read_tensors(peer)
    assert ours.keys() == theirs.keys()
    for tensor, expected in theirs.items():
        rows = reorder(expected, vocab, of_peer) if tensor in ROWS else expected
        assert ours[tensor].shape == rows.shape, tensor
        worst = ((ours[tensor] - rows).abs().max() / rows.abs().max()).item()
        assert worst <= bound, (tensor, worst)
    sizes = [json.loads((model / "config.json").read_text())["vocab_size"] for model in (out, peer)]
    assert sizes[0] == sizes[1] == len(ours[ROWS[0]])


@cache
def list_lines(number: int) -> list[str]:
    """Return lines of this project's pages and code, and lines of words, marks and characters at random."""
    draw = random.Random(0)
    root = Path(__file__).parents[1]
    files = sorted([*root.glob("docs/*.md"), *root.glob("pipeline/**/*.py")])
    written = [line for path in files for line in path.read_text().splitlines()]
    words = [*" ".join(TEXTS).split(), "<s>", "<pad>", "<|im_start|>", "foo bar", "Größe", "漢字", "😀", "\n", "  "]
    drawn = [" ".join(draw.choices(words, k=draw.randint(1, 12))) for _ in range(number // 4)]
    letters = [chr(code) for code in range(0x20, 0x3100)]
    drawn += ["".join(draw.choices(letters, k=draw.randint(1, 40))) for _ in range(number // 4)]
    return drawn + draw.sample(written, number - len(drawn))


def check_texts(out: Path, peer: Path, lines: list[str]) -> None:
    """Compare how texts are split, and what is known of each added token."""
    ours, theirs = (Tokenizer.from_file(str(model / "tokenizer.json")) for model in (out, peer))
    for mine, other in zip(
        ours.encode_batch(lines, add_special_tokens=False),
        theirs.encode_batch(lines, add_special_tokens=False),
        strict=True,
    ):
        assert mine.tokens == other.tokens
    flags = [
        {
            token.content: (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
            for token in tokenizer.get_added_tokens_decoder().values()
        }
        for tokenizer in (ours, theirs)
    ]
    assert flags[0] == flags[1]
