"""Tokenizers that differ where a config says nothing of them."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from raymerge import plan
from tests.tokenized_models import TEXTS, byte_level, write_tokenized, write_tokenizer


def linear(*models: Path, **more: Any) -> dict[str, Any]:
    entries = [{"model": str(model)} for model in models]
    return {"merge_method": "linear", "models": entries, "parameters": {"weight": 1}, **more}


@pytest.fixture
def models(tmp_path: Path) -> list[Path]:
    return [write_tokenized(tmp_path / name, seed, byte_level(TEXTS[0])) for seed, name in enumerate("ab")]


def test_equal_tokenizers_are_no_word_worth(models: list[Path]) -> None:
    other = models[1] / "tokenizer.json"
    other.write_text(json.dumps(json.loads(other.read_text())))
    assert plan(linear(*models)).warnings == ()


def test_two_swapped_tokens_are_told(models: list[Path]) -> None:
    file = models[1] / "tokenizer.json"
    content = json.loads(file.read_text())
    vocab = content["model"]["vocab"]
    vocab["!"], vocab["#"] = vocab["#"], vocab["!"]
    file.write_text(json.dumps(content))
    (warning,) = plan(linear(*models)).warnings
    assert warning.startswith("2 rows of embedding and head that are other tokens in one model than in the other (")
    assert f"is '!' in {models[0]} and '#' in {models[1]}" in warning
    assert plan(linear(*models, tokenizer_source="base")).warnings == ()


def test_tokens_in_rows_that_are_padding_elsewhere_are_told(tmp_path: Path) -> None:
    tokenizer = byte_level(TEXTS[0])
    first = write_tokenized(tmp_path / "a", 0, tokenizer, more_rows=8)
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    second = write_tokenized(tmp_path / "b", 1, tokenizer, more_rows=6)
    (warning,) = plan(linear(first, second)).warnings
    assert warning.startswith(f"{second}: 2 tokens ('<|im_start|>', '<|im_end|>') that {first} does not have")


def test_other_special_tokens_and_templates_are_told(models: list[Path]) -> None:
    write_tokenizer(models[1], byte_level(TEXTS[0]), eos_token="<s>", chat_template="{{ messages }}")
    special, template = plan(linear(*models)).warnings
    assert special.startswith(f"eos_token is '</s>' in {models[0]} and '<s>' in {models[1]}; the output gets")
    assert template.startswith(f"{models[1]}: another chat template than {models[0]}")


def test_a_malformed_tokenizer_does_not_stop_a_merge_that_needs_none(models: list[Path]) -> None:
    (models[1] / "tokenizer.json").write_text("{")
    (warning,) = plan(linear(*models)).warnings
    assert warning.startswith("tokenizers could not be compared: ")
    assert "not JSON" in warning


def test_equal_copies_are_not_parsed(models: list[Path]) -> None:
    for model in models:
        (model / "tokenizer.json").write_text("{")
    assert plan(linear(*models)).warnings == ()


def test_files_of_one_size_are_compared_to_their_ends(models: list[Path]) -> None:
    for model, last in zip(models, "{}", strict=True):
        (model / "tokenizer.json").write_text(" " * 2**23 + last)
    (warning,) = plan(linear(*models)).warnings
    assert warning.startswith("tokenizers could not be compared: ")


def test_tokens_that_loaders_add_to_equal_tokenizers_are_told(models: list[Path]) -> None:
    write_tokenizer(models[1], byte_level(TEXTS[0]), added_tokens_decoder={"300": {"content": "<think>"}})
    (warning,) = plan(linear(*models)).warnings
    assert warning.startswith(f"{models[1]}: 1 token ('<think>') that {models[0]} does not have")


def test_files_that_are_too_large_for_tokenizers_are_not_read(models: list[Path]) -> None:
    for model in models:
        os.truncate(model / "tokenizer.json", 2**30)
    (warning,) = plan(linear(*models)).warnings
    assert warning.startswith("tokenizers could not be compared: ")
    assert "1,073,741,824 bytes" in warning
