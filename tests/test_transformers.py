"""Models that transformers saved, merged, and loaded by transformers again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raymerge import merge
from raymerge.pipeline.errors import CheckpointError
from tests.checkpoints import INDEX

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "dtype": torch.bfloat16,
}
PROMPT = torch.tensor([[1, 5, 9, 13, 17]])


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def make_model(architecture: str, seed: int) -> PreTrainedModel:
    torch.manual_seed(seed)
    if architecture == "llama":
        return LlamaForCausalLM(LlamaConfig(**SIZES)).bfloat16()
    return Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=architecture == "qwen2")).bfloat16()


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def models(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """A base and a fine-tune, each in several shards."""
    directory = tmp_path_factory.mktemp(request.param)
    base = make_model(request.param, 0)
    base.save_pretrained(directory / "base", max_shard_size="30KB")
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    base.save_pretrained(directory / "tuned", max_shard_size="30KB")
    assert len(list((directory / "base").glob("*.safetensors"))) > 1
    return [directory / "base", directory / "tuned"]


def load(directory: Path) -> PreTrainedModel:
    """Load a model, and let it generate; every weight must be in the files, and every tensor in the model."""
    factory: Any = AutoModelForCausalLM  # annotated as if it returned the model alone
    model, info = factory.from_pretrained(directory, output_loading_info=True)
    assert not any(info.values()), info
    assert model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 9)
    assert isinstance(model, PreTrainedModel)
    return model


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        values: torch.Tensor = model(PROMPT).logits
    return values


def make_config(method: str, models: list[Path], weight: float = 1) -> dict[str, Any]:
    base = {} if method == "linear" else {"base_model": str(models[0])}
    listed = models if method in ("linear", "slerp") else models[1:]
    parameters = {"t": 0.5} if method == "slerp" else {"weight": weight}
    return {
        "merge_method": method,
        **base,
        "models": [{"model": str(model)} for model in listed],
        "parameters": parameters,
    }


@pytest.mark.parametrize("method", ["linear", "slerp", "task_arithmetic", "ties", "dare_ties"])
def test_merged_models_load_and_generate(method: str, models: list[Path], tmp_path: Path) -> None:
    merge(make_config(method, models), tmp_path / "out", shard_size="20kB")
    merged = load(tmp_path / "out")
    base, tuned = (load(model) for model in models)
    assert merged.config.to_dict() == base.config.to_dict() | {"_name_or_path": str(tmp_path / "out")}
    assert merged.dtype == torch.bfloat16
    # ties without thinning, with one model, and task arithmetic give that model; the others lie between the two.
    found, first, second = logits(merged), logits(base), logits(tuned)
    if method in ("task_arithmetic", "ties", "dare_ties"):
        torch.testing.assert_close(found, second, rtol=0, atol=0)
    else:
        assert not torch.equal(found, first)
        assert (found - first).norm() < (second - first).norm()
        assert (found - second).norm() < (second - first).norm()


def test_a_model_merged_with_itself_is_itself(models: list[Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.symlink_to(models[0])
    for method in ("linear", "slerp", "ties"):
        merge(make_config(method, [models[0], copy], 0.5), tmp_path / method)
        assert torch.equal(logits(load(tmp_path / method)), logits(load(models[0])))


def test_stacked_layers(models: list[Path], tmp_path: Path) -> None:
    """Layers 0 to 2 of one model, then 1 to 3 of the other: the same layers, put together by hand."""
    parts = [(0, 0, 3), (1, 1, 4)]
    config = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(models[m]), "layer_range": [a, b]}]} for m, a, b in parts],
    }
    merge(config, tmp_path / "out", shard_size="20kB")
    merged = load(tmp_path / "out")
    assert merged.config.num_hidden_layers == 6
    first, last = (load(model) for model in models)
    by_hand = [layer for m, a, b in parts for layer in (first, last)[m].model.layers[a:b]]
    for index, layer in enumerate(by_hand):
        layer.self_attn.layer_idx = index
    first.model.layers = torch.nn.ModuleList(by_hand)
    first.model.norm = last.model.norm
    first.config.num_hidden_layers = 6
    if not first.config.tie_word_embeddings:
        first.lm_head = last.lm_head
    else:
        assert merged.config.tie_word_embeddings is False  # the head is the last model's embedding
        first.lm_head.weight = torch.nn.Parameter(last.model.embed_tokens.weight.clone())
    first.config.layer_types = merged.config.layer_types if hasattr(merged.config, "layer_types") else None
    assert torch.equal(logits(merged), logits(first))


def test_a_tied_model_and_an_untied_one(tmp_path: Path) -> None:
    """The tied model's embedding counts as its head."""
    tied = make_model("qwen2", 0)
    untied = make_model("qwen2 with a head", 1)
    tied.save_pretrained(tmp_path / "tied")
    untied.save_pretrained(tmp_path / "untied")
    report = merge(make_config("linear", [tmp_path / "tied", tmp_path / "untied"]), tmp_path / "out")
    assert any("tie_word_embeddings: false" in warning for warning in report.warnings)
    merged = load(tmp_path / "out")
    assert merged.config.tie_word_embeddings is False
    expected = (tied.get_input_embeddings().weight.float() + untied.lm_head.weight.float()) / 2
    torch.testing.assert_close(merged.lm_head.weight, expected.to(torch.bfloat16), rtol=0, atol=0)


def test_a_stored_head_counts_whatever_the_config_says_of_tying(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        model = make_model("llama", seed)
        model.config.tie_word_embeddings = True  # as published by trainers that untie a head and keep the config
        model.save_pretrained(tmp_path / name)
    parents = [AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("a", "b")]
    merge(make_config("linear", [tmp_path / "a", tmp_path / "b"]), tmp_path / "out")
    merged = load(tmp_path / "out")
    expected = torch.stack([parent.lm_head.weight for parent in parents]).float().mean(0)
    assert merged.config.tie_word_embeddings is False
    assert torch.equal(merged.lm_head.weight.float(), expected.to(torch.bfloat16).float())
    assert not torch.equal(merged.lm_head.weight, merged.model.embed_tokens.weight)


def save(seed: int, directory: Path, max_shard_size: str) -> None:
    make_model("llama", seed).save_pretrained(directory, max_shard_size=max_shard_size)


def repeat_tensor(directory: Path, file: str, *, is_named: bool) -> None:
    """Give the first shard or the last a tensor of the middle one, with other values; the index names it or not."""
    index = json.loads((directory / INDEX).read_text())
    weight_map = index["weight_map"]
    middle = sorted(set(weight_map.values()))[1]
    name = next(name for name in weight_map if weight_map[name] == middle)
    tensors = load_file(directory / file)
    tensors[name] = torch.ones_like(load_file(directory / middle)[name])
    save_file(tensors, directory / file, metadata={"format": "pt"})
    if is_named:
        weight_map[name] = file
    (directory / INDEX).write_text(json.dumps(index))


@pytest.mark.parametrize("condition", ["old index", "old shards", "tensor nowhere", "tensor unnamed", "first", "last"])
def test_weights_as_they_are_found(condition: str, tmp_path: Path) -> None:
    """Whatever state a directory of weights is in, what is merged is what transformers loads."""
    model, old = tmp_path / "model", tmp_path / "old"
    save(1, model, "30KB")
    shards = sorted(path.name for path in model.glob("*.safetensors"))
    index = json.loads((model / INDEX).read_text())
    if condition in ("old index", "old shards"):
        shutil.copytree(model, old)
        save(2, model, "1GB")
        assert (model / INDEX).exists()
        assert not (model / shards[0]).exists()
        if condition == "old shards":
            for name in shards:
                shutil.copy(old / name, model)
    elif condition in ("first", "last"):
        repeat_tensor(model, shards[0 if condition == "first" else -1], is_named=condition == "first")
    else:
        if condition == "tensor nowhere":
            index["weight_map"]["mtp.fc.weight"] = shards[-1]
        else:
            del index["weight_map"]["lm_head.weight"]
        (model / INDEX).write_text(json.dumps(index))
    expected = AutoModelForCausalLM.from_pretrained(model).state_dict()
    config = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    if condition != "old index":
        with pytest.raises(CheckpointError, match="--trust-headers"):
            merge(config, tmp_path / "out")
    report = merge(config, tmp_path / "out", trust_headers=condition != "old index")
    assert any("transformers" in warning or "the headers decide" in warning for warning in report.warnings)
    found = load(tmp_path / "out").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
