"""Merges of models with different tokenizers, row by row."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from raymerge import merge, plan
from raymerge.testing import merge_in_every_way
from tests.checkpoints import read_tensors
from tests.tokenized_models import (
    TEXTS,
    align,
    byte_level,
    draw_lines,
    read_vocab,
    write_family,
    write_large_pair,
    write_tokenized,
    write_tokenizer,
)

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
WEIGHTS = (0.5, 0.25, -0.5)


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return write_family(tmp_path_factory.mktemp("family"))


def linear(models: list[Path], weights: tuple[float, ...] = WEIGHTS, **more: Any) -> dict[str, Any]:
    entries = [
        {"model": str(model), "parameters": {"weight": weight}} for model, weight in zip(models, weights, strict=False)
    ]
    config = {"merge_method": "linear", "models": entries, "parameters": {"normalize": False}, "dtype": "float32"}
    return {**config, **more}


def expect(models: list[Path], out: dict[str, int], name: str, base: int | None = 0) -> torch.Tensor:
    rows = [read_tensors(model)[name] for model in models]
    aligned = align(rows, [read_vocab(model) for model in models], out, base)
    return sum((w * x.double() for w, x in zip(WEIGHTS, aligned, strict=False)), torch.zeros(1)).float()


@pytest.mark.parametrize("source", ["base", "union", "second"])
@pytest.mark.parametrize("has_base", [True, False])
def test_each_token_has_its_row(family: list[Path], source: str, has_base: bool, tmp_path: Path) -> None:
    asked = str(family[1]) if source == "second" else source
    base: dict[str, Any] = {"base_model": str(family[0])} if has_base else {}
    out = tmp_path / "out"
    merge(linear(family, tokenizer_source=asked, **base), str(out), workers=1)
    vocab, merged = read_vocab(out), read_tensors(out)
    own = [read_vocab(model) for model in family]
    wanted = {"base": own[0].keys(), "union": {*own[0], *own[1], *own[2]}, "second": own[1].keys()}
    assert vocab.keys() == wanted[source]
    for name in (EMBEDDING, HEAD):
        torch.testing.assert_close(merged[name], expect(family, vocab, name, 0 if has_base else None))
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == len(vocab) == len(merged[EMBEDDING])


def test_merged_in_every_way_it_is_the_same(tmp_path: Path) -> None:
    models = write_family(tmp_path / "models", dtype=torch.bfloat16)
    for method, parameters in (("linear", {}), ("ties", {"density": 0.5})):
        config = linear(
            models,
            merge_method=method,
            base_model=str(models[0]),
            parameters=parameters,
            tokenizer={"source": "union", "pad_to_multiple_of": 64, "tokens": {"<new>": {"source": {"kind": "zero"}}}},
        )
        merged = merge_in_every_way(config, tmp_path / method)
        assert len(merged[EMBEDDING]) % 64 == 0


def test_tokens_with_rows_of_their_own(family: list[Path], tmp_path: Path) -> None:
    second = str(family[1])
    tokens = {
        "<|im_start|>": {"source": {"kind": "zero"}},
        "<|im_end|>": {"source": second},
        "<new>": {"source": {"kind": "model_token", "model": second, "token": "foo bar"}},
        "<s>": {"source": {"kind": "model_token", "model": second, "token_id": 7}, "force": True},
        "</s>": {"source": {"kind": "zero"}},
    }
    out = tmp_path / "out"
    weights = (1.0, 10.0)
    merge(linear(family[:2], weights, tokenizer={"tokens": tokens}), str(out), workers=1)
    vocab, merged = read_vocab(out), read_tensors(out)[EMBEDDING]
    one, two = (read_tensors(model)[EMBEDDING] for model in family[:2])
    of_second = read_vocab(family[1])
    torch.testing.assert_close(merged[vocab["<|im_start|>"]], 10 * two[of_second["<|im_start|>"]])
    torch.testing.assert_close(merged[vocab["<|im_end|>"]], 11 * two[of_second["<|im_end|>"]])
    torch.testing.assert_close(merged[vocab["<new>"]], 11 * two[of_second["foo bar"]])
    torch.testing.assert_close(merged[vocab["<s>"]], 11 * two[7])
    torch.testing.assert_close(merged[vocab["</s>"]], one[1] + 10 * two[1])


@pytest.mark.parametrize("more_rows", [0, 9])
def test_padding_is_the_mean_of_all_rows(more_rows: int, tmp_path: Path) -> None:
    tokenizer = byte_level(TEXTS[0], 275)
    model = write_tokenized(tmp_path / "m", 0, tokenizer, more_rows=more_rows, tied=True)
    config = linear([model], (1.0,), tokenizer={"source": "base", "pad_to_multiple_of": 32})
    merge(config, str(tmp_path / "out"), workers=1)
    merged, rows = read_tensors(tmp_path / "out"), read_tensors(model)[EMBEDDING]
    assert merged.keys() == read_tensors(model).keys()  # tied, it stays
    assert len(merged[EMBEDDING]) == 288
    torch.testing.assert_close(merged[EMBEDDING][:275], rows[:275])
    torch.testing.assert_close(merged[EMBEDDING][275:], rows[:275].mean(0).expand(13, -1))


def test_rows_beyond_the_tokenizer_are_cut_off(tmp_path: Path) -> None:
    model = write_tokenized(tmp_path / "m", 0, byte_level(TEXTS[0], 275), more_rows=5)
    config = linear([model], (1.0,), tokenizer_source="base")
    planned = plan(config)
    assert planned.vocabulary[0] == "275 tokens"
    merge(config, str(tmp_path / "out"), workers=1)
    assert torch.equal(read_tensors(tmp_path / "out")[EMBEDDING], read_tensors(model)[EMBEDDING][:275])
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (model / "tokenizer.json").read_bytes()


def test_rows_of_tokens_are_found_in_heads_with_padding_and_in_layers(family: list[Path], tmp_path: Path) -> None:
    inner = "model.layers.1.shared_head.head.weight"
    models = []
    for model in family[:2]:
        copy = shutil.copytree(model, tmp_path / model.name)
        tensors = load_file(copy / "model.safetensors")
        tensors[HEAD] = torch.cat([tensors[HEAD], torch.ones(7, 16)])
        tensors[inner] = tensors[EMBEDDING].clone()
        save_file(tensors, copy / "model.safetensors")
        models.append(copy)
    config = linear(models, base_model=str(models[0]), tokenizer_source="union")
    done = merge(config, str(tmp_path / "out"), workers=1)
    vocab, merged = read_vocab(tmp_path / "out"), read_tensors(tmp_path / "out")
    for name in (EMBEDDING, HEAD, inner):
        torch.testing.assert_close(merged[name], expect(models, vocab, name))
    assert not done.warnings


def test_rows_that_may_be_those_of_tokens_are_told(tmp_path: Path) -> None:
    models = [write_tokenized(tmp_path / "a", 0, byte_level(TEXTS[0], 280))]
    models.append(write_tokenized(tmp_path / "b", 1, byte_level(TEXTS[1], 280)))
    for model in models:
        tensors = load_file(model / "model.safetensors")
        tensors["model.unknown.weight"] = tensors[EMBEDDING].clone()
        save_file(tensors, model / "model.safetensors")
    told = plan(linear(models, tokenizer_source="base")).warnings
    assert ["1 tensor (model.unknown.weight) merged row by row by number" in warning for warning in told] == [True]
    assert not plan(linear(models[:1], (1.0,), tokenizer_source="base")).warnings


def test_slices_have_one_vocabulary(family: list[Path], tmp_path: Path) -> None:
    slices = [{"sources": [{"model": str(model), "layer_range": [0, 1]}]} for model in family[:2]]
    config = {"merge_method": "passthrough", "slices": slices, "tokenizer_source": "union"}
    done = merge(config, str(tmp_path / "out"), workers=1)
    vocab, merged = read_vocab(tmp_path / "out"), read_tensors(tmp_path / "out")
    one, two = map(read_vocab, family[:2])
    embedding, head = read_tensors(family[0])[EMBEDDING], read_tensors(family[1])[HEAD]
    for token, number in vocab.items():
        own = embedding[one[token]] if token in one else torch.zeros(16)
        assert torch.equal(merged[EMBEDDING][number], own)
        own = head[two[token]] if token in two else torch.zeros(16)
        assert torch.equal(merged[HEAD][number], own)
    told = [warning for warning in done.warnings if "rows are zeros" in warning]
    assert len(told) == 2
    assert f"{len(vocab) - len(one)} tokens" in told[0]


def test_transformers_loads_what_a_union_makes(family: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    merge(linear(family, tokenizer_source="union", base_model=str(family[0])), str(out), workers=1)
    tokenizer: Any = AutoTokenizer.from_pretrained(out)
    model: Any = AutoModelForCausalLM.from_pretrained(out)
    assert len(tokenizer) == model.config.vocab_size
    text = "<s><|im_start|>the foo bar fox</s>"
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids[0].tolist() == Tokenizer.from_file(str(out / "tokenizer.json")).encode(text).ids
    assert tokenizer.convert_tokens_to_ids("<|im_start|>") in ids[0]
    assert model(ids).logits.shape == (1, ids.shape[1], len(tokenizer))
    assert model.config.eos_token_id == tokenizer.eos_token_id == 1


def test_special_tokens_follow_the_tokenizer(family: list[Path], tmp_path: Path) -> None:
    other = byte_level(TEXTS[1], 270)
    other.add_special_tokens(["<|eot|>"])
    write_tokenizer(tmp_path / "other", other, eos_token="<|eot|>", pad_token="</s>")
    eot = other.token_to_id("<|eot|>")
    stated = {"model_type": "llama", "eos_token_id": eot, "bos_token_id": 0, "pad_token_id": 1}
    (tmp_path / "other/config.json").write_text(json.dumps(stated))
    donor = write_tokenized(tmp_path / "donor", 0, byte_level(TEXTS[0]), pad_token_id=None)
    generation = {"eos_token_id": [1, 5], "bos_token_id": 0, "temperature": 0.5}
    (donor / "generation_config.json").write_text(json.dumps(generation))
    out = tmp_path / "out"
    config = linear([donor], (1.0,), tokenizer_source=str(tmp_path / "other"))
    done = merge(config, str(out), workers=1)
    config_json = json.loads((out / "config.json").read_text())
    assert (config_json["eos_token_id"], config_json["vocab_size"]) == (eot, 271)
    found = json.loads((out / "generation_config.json").read_text())
    assert found == {"eos_token_id": eot, "bos_token_id": 0, "temperature": 0.5}
    assert json.loads((out / "tokenizer_config.json").read_text())["eos_token"] == "<|eot|>"
    assert any("'<|eot|>'" in warning and "rows are zeros" in warning for warning in done.warnings)


def test_plan_says_whose_rows_they_are(family: list[Path]) -> None:
    lines = plan(linear(family, base_model=str(family[0]), tokenizer_source="union")).vocabulary
    assert lines[0] == "334 tokens"
    assert lines[1].startswith(f"{family[0]}: 281 rows of its own, ")


@pytest.mark.slow  # two vocabularies of 150,000 tokens, and 10,000 lines
def test_a_union_of_large_vocabularies(tmp_path: Path) -> None:
    words = write_large_pair(tmp_path)
    models = [tmp_path / "a", tmp_path / "b"]
    out = tmp_path / "out"
    merge(linear(models, base_model=str(models[0]), tokenizer_source="union"), str(out), workers=1)
    vocab, first, second = (read_vocab(model) for model in (out, *models))
    assert min(len(first), len(second)) > 150_000
    assert vocab.keys() == first.keys() | second.keys()
    assert sorted(vocab.values()) == list(range(len(vocab)))
    assert first.items() <= vocab.items()
    torch.testing.assert_close(read_tensors(out)[EMBEDDING], expect(models, vocab, EMBEDDING))

    merged, base = (Tokenizer.from_file(str(model / "tokenizer.json")) for model in (out, models[0]))
    lines = draw_lines(10_000, words, 0)
    pairs = zip(merged.encode_batch(lines), base.encode_batch(lines), strict=True)
    split = [(ours, theirs) for ours, theirs in pairs if max(ours.ids, default=0) < len(first)]
    assert len(split) > 5000  # the others have tokens that are new
    assert all(ours.ids == theirs.ids for ours, theirs in split)
    assert all(merged.decode(ours.ids) == base.decode(ours.ids) for ours, _ in split)
