"""Files of tokenizers that are not as they should be."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from raymerge import plan
from raymerge.pipeline.errors import CheckpointError, ConfigError, MemoryLimitError, TensorMismatchError
from tests.checkpoints import write_config
from tests.tokenized_models import TEXTS, byte_level, unigram, write_tokenized


def ask(*models: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model)} for model in models]
    config = {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}, "tokenizer_source": "union"}
    return config | more


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tokenized(tmp_path / "m", 0, byte_level(TEXTS[0]))


def change(model: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    file = model / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))


EDITS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no model": (lambda c: c.pop("model"), "`model` is missing"),
    "no vocab": (lambda c: c["model"].pop("vocab"), r"model\.vocab is missing"),
    "other kind": (lambda c: c["model"].update(type="Neural"), "model.type is \"Neural\"; known are BPE"),
    "a word for a number": (lambda c: c["model"]["vocab"].update({"!": "5"}), "token '!' has the number \"5\""),
    "a negative number": (lambda c: c["model"]["vocab"].update({"!": -1}), "token '!' has the number -1"),
    "two tokens of one number": (
        lambda c: c["model"]["vocab"].update({"!": c["model"]["vocab"]["#"]}),
        "1 number of more than one token: '!' and '#' are both",
    ),
    "two numbers of one token": (
        lambda c: c["added_tokens"].append({"id": 7, "content": "<s>x"}) or c["model"]["vocab"].update({"<s>x": 999}),
        "'<s>x' is 999 in `model.vocab` and 7 in `added_tokens`",
    ),
    "added token without id": (lambda c: c["added_tokens"].append({"content": "x"}), r"added_tokens\[2\] is"),
    "added tokens by name": (lambda c: c.update(added_tokens={"x": 1}), "added_tokens is .* a list is needed"),
    "deep": (lambda c: c.update(normalizer=json.loads("[" * 200 + "]" * 200)), "nested too deeply"),
}  # fmt: skip


@pytest.mark.parametrize("name", EDITS)
def test_malformed_files_are_refused_by_name(name: str, model: Path) -> None:
    edit, message = EDITS[name]
    change(model, edit)
    with pytest.raises(CheckpointError, match=message) as caught:
        plan(ask(model))
    assert str(model / "tokenizer.json") in str(caught.value)


def test_no_json(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: not JSON"):
        plan(ask(model))


def test_a_slow_tokenizer_gets_a_command_that_converts_it(model: Path) -> None:
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json, but tokenizer\.model, .*AutoTokenizer"):
        plan(ask(model))


def test_no_tokenizer_at_all_is_the_bases(model: Path, tmp_path: Path) -> None:
    bare = write_tokenized(tmp_path / "bare", 1, byte_level(TEXTS[0]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bare / name).unlink()
    planned = plan(ask(model, bare))
    assert planned.warnings == (f"{bare}: no tokenizer; its tokens count as those of {model}",)
    with pytest.raises(CheckpointError, match=r"tokenizer_source: .* has no tokenizer, which union begins with"):
        plan(ask(bare, model))


def test_a_model_for_the_tokenizer_that_is_not_there(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokenizer_source: .*no such directory"):
        plan(ask(model, tokenizer_source="./nowhere"))


def test_the_line_of_a_token_that_its_model_has_not(model: Path, tmp_path: Path) -> None:
    row = {"kind": "model_token", "model": str(model), "token": "<none>"}
    file = write_config(
        tmp_path / "merge.yml", ask(model, tokenizer_source=None, tokenizer={"tokens": {"<new>": {"source": row}}})
    )
    line = next(k for k, text in enumerate(file.read_text().splitlines(), 1) if text.strip() == "source:")
    with pytest.raises(
        ConfigError, match=rf"merge\.yml:{line}: tokenizer\.tokens\.<new>\.source: .* no token '<none>'"
    ):
        plan(file)


def test_more_than_the_memory_is_for_is_refused_unread(model: Path) -> None:
    (model / "tokenizer.json").write_text('{"model": {' + " " * (32 * 2**20 + 1000) + "}}")
    with pytest.raises(MemoryLimitError, match=r"tokenizer\.json: 33,555,\d+ bytes, .* give --memory"):
        plan(ask(model), memory="64MiB")


def test_tokenizers_that_take_more_together_than_the_memory_is_for(tmp_path: Path) -> None:
    models = [write_tokenized(tmp_path / str(k), k, byte_level(TEXTS[k])) for k in range(3)]
    for model in models:
        with (model / "tokenizer.json").open("a") as file:
            file.write(" " * (8 * 2**20))
    with pytest.raises(
        MemoryLimitError, match=r"/2/tokenizer\.json: with 2 tokenizers of other models it takes 289MiB"
    ):
        plan(ask(*models), memory="64MiB")
    config = ask(*models)
    del config["tokenizer_source"]
    warnings = plan(config, memory="64MiB").warnings  # compares them one by one
    assert not [warning for warning in warnings if "could not be compared" in warning]


def test_a_tokenizer_with_more_tokens_than_the_embedding_has_rows(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXTS[0])
    first = write_tokenized(tmp_path / "a", 0, tokenizer)
    second = write_tokenized(tmp_path / "b", 1, tokenizer)
    rows = tokenizer.get_vocab_size()
    change(second, lambda c: c["added_tokens"].append({"id": rows, "content": "<pad>", "special": True}))
    (warning,) = plan(ask(first, second)).warnings
    assert warning.startswith(f"{second}: 1 token ('<pad>') of its tokenizer beyond the {rows} rows of its embedding")
    config = ask(first, second, tokenizer={"tokens": {"<pad>": {"source": str(second)}}})
    del config["tokenizer_source"]
    with pytest.raises(ConfigError, match=rf"<pad>.source: row {rows} of .* is asked for, and its .* has {rows}"):
        plan(config)
    config["tokenizer"] = {"tokens": {"<pad>": {"source": str(first)}}}
    with pytest.raises(ConfigError, match=r"<pad>.source: .* has no token '<pad>'"):
        plan(config)


def test_unigrams_beyond_the_embedding_cannot_be_taken_out(tmp_path: Path) -> None:
    model = write_tokenized(tmp_path / "u", 0, unigram(TEXTS[0]), more_rows=-2)
    with pytest.raises(CheckpointError, match=r"2 tokens, .* are beyond the \d+ rows of the embedding"):
        plan(ask(model))


def test_models_of_other_widths(model: Path, tmp_path: Path) -> None:
    wide = write_tokenized(tmp_path / "wide", 1, byte_level(TEXTS[1]), width=32)
    with pytest.raises(TensorMismatchError, match=r"rows of \[16\] in .* and of \[32\] in"):
        plan(ask(model, wide))


def test_many_added_tokens(tmp_path: Path) -> None:
    """Rows that are not there are none, however many tokens a file names."""
    tokenizer = byte_level(TEXTS[0])
    first, second = (write_tokenized(tmp_path / name, k, tokenizer) for k, name in enumerate("ab"))
    rows = tokenizer.get_vocab_size()
    more = [{"id": rows + k, "content": f"<{k}>", "special": True} for k in range(20_000)]
    change(second, lambda c: c["added_tokens"].extend(more))
    planned = plan(ask(first, second))
    assert planned.vocabulary[0] == f"{rows} tokens"
    assert "20,000 tokens ('<0>', '<1>', " in planned.warnings[0]
