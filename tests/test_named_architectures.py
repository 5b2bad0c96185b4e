"""The architectures that people merge most: two fine-tunes of each, by four methods, stacked, pruned, and run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from raymerge import merge
from raymerge.pipeline.progress.events import Warned
from tests.architectures import load, make_config
from tests.checkpoints import Tensors
from tests.references import find_exact
from tests.watchers import Keep

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

NAMED: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM": {},
    "MistralForCausalLM": {},
    "Qwen2ForCausalLM": {},
    "Qwen3ForCausalLM": {},
    "Qwen3_5ForCausalLM": {},
    "Gemma2ForCausalLM": {},
    "Gemma3ForCausalLM": {},
    "Gemma3ForConditionalGeneration": {},
    "Gemma3nForCausalLM": {"num_kv_shared_layers": 0},
    "Phi3ForCausalLM": {},
    "MixtralForCausalLM": {},
    "Qwen3MoeForCausalLM": {},
    "GptOssForCausalLM": {},
    "Mamba2ForCausalLM": {"num_heads": 8, "head_dim": 8},
    "Zamba2ForCausalLM": {"layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"], "num_key_value_heads": 4},
    "FalconH1ForCausalLM": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16},
    "GPT2LMHeadModel": {},
    "GPTNeoXForCausalLM": {},
    "BertForMaskedLM": {},
    "RobertaForMaskedLM": {},
    "BertModel": {},
    "T5ForConditionalGeneration": {},
    "WhisperForConditionalGeneration": {},
    "CLIPModel": {},
    "SiglipModel": {},
    "Qwen2_5_VLForConditionalGeneration": {
        "text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    },
}
"""Architectures, with sizes besides the usual ones where these do not fit together."""
WARNED = {"Gemma3nForCausalLM", "Zamba2ForCausalLM"}
"""Those with a tensor for all layers, of which each has a part, or that is in one of them alone."""
FORMAT = {"format": "pt"}
METHODS: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "ties": {"weight": 0.5, "density": 0.6},
    "task_arithmetic": {"weight": 0.4},
}
IDS = torch.arange(3, 13)[None]


def make_inputs(config: Any) -> dict[str, torch.Tensor]:
    if config.model_type == "whisper":
        features = torch.ones(1, config.num_mel_bins, 2 * config.max_source_positions)
        return {"input_features": features, "decoder_input_ids": IDS}
    inputs = {"input_ids": IDS}
    if config.is_encoder_decoder:
        inputs["decoder_input_ids"] = IDS
    if config.model_type in ("clip", "siglip"):
        size = config.vision_config.image_size
        inputs["pixel_values"] = torch.linspace(-1, 1, 3 * size * size).view(1, 3, size, size)
    return inputs


def run(model: Any) -> torch.Tensor:
    """Return what a model says of ten tokens."""
    with torch.no_grad():
        found = model.eval()(**make_inputs(model.config))
    values = next(found[name] for name in ("logits", "last_hidden_state", "logits_per_image") if name in found)
    assert isinstance(values, torch.Tensor)
    return values.double()


def write_models(name: str, directory: Path) -> Any:
    """Save a base and two fine-tunes of it; return the class."""
    kind: Any = getattr(transformers, name)
    torch.manual_seed(1)
    model = kind(make_config(kind.config_class, **dict(NAMED[name])))
    if name == "GptOssForCausalLM":
        model = model.bfloat16()
    model.save_pretrained(directory / "base")
    for tuned in ("a", "b"):
        shutil.copytree(directory / "base", directory / tuned)
        tensors = load_file(directory / tuned / "model.safetensors")
        save_file({key: add_noise(x) for key, x in tensors.items()}, directory / tuned / "model.safetensors", FORMAT)
    return kind


def add_noise(x: torch.Tensor) -> torch.Tensor:
    return (x + 0.02 * torch.randn(x.shape)).to(x.dtype) if x.is_floating_point() else x


def find_expected(method: str, stored: list[Tensors], found: Tensors) -> Tensors:
    """Return the merge of stored tensors in float64, rounded once."""
    values: Mapping[str, Any] = METHODS[method]
    num_models = {"linear": 3, "slerp": 0}.get(method, 2)
    parameters = {key: value if key == "t" else (value,) * num_models for key, value in values.items()}
    expected = {}
    for name, merged in found.items():
        sources = [tensors[name] for tensors in stored[: 2 if method == "slerp" else 3]]
        exact = find_exact(method, sources, parameters)
        expected[name] = torch.where(exact.is_draw, merged.double(), exact.values).to(merged.dtype)
    return expected


@pytest.mark.parametrize("name", NAMED)
def test_four_methods(name: str, tmp_path: Path) -> None:
    kind = write_models(name, tmp_path)
    places = [tmp_path / each for each in ("base", "a", "b")]
    stored = [load_file(place / "model.safetensors") for place in places]
    said = load(kind, tmp_path / "base")[1]
    for method, parameters in METHODS.items():
        base: dict[str, Any] = {} if method == "linear" else {"base_model": str(places[0])}
        listed = places if method == "linear" else places[1:]
        models = [{"model": str(place), "parameters": dict(parameters)} for place in listed]
        if method == "slerp":
            base, models = {**base, "parameters": parameters}, [{"model": str(places[1])}]
        merge({"merge_method": method, "models": models, **base}, tmp_path / method, workers=1)
        merged, said_of_merged = load(kind, tmp_path / method)
        assert said_of_merged == said
        found = load_file(tmp_path / method / "model.safetensors")
        expected = find_expected(method, stored, found)
        shutil.copytree(tmp_path / "base", tmp_path / "expected", dirs_exist_ok=True)
        save_file(expected, tmp_path / "expected" / "model.safetensors", FORMAT)
        is_half = next(iter(found.values())).dtype == torch.bfloat16
        rtol, atol = (2**-7, 1e-3) if is_half else (1e-5, 1e-6)
        for key, x in found.items():
            torch.testing.assert_close(x, expected[key], rtol=rtol, atol=atol)
        torch.testing.assert_close(run(merged), run(load(kind, tmp_path / "expected")[0]), rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in NAMED if "ForCausalLM" in name or "GPT" in name])
def test_stacked_and_pruned(name: str, tmp_path: Path) -> None:
    """What transformers loads is whole and runs; else the plan has warned."""
    kind = write_models(name, tmp_path)
    said = load(kind, tmp_path / "base")[1]
    for result, ranges in (("stack", [[0, 2], [0, 4]]), ("prune", [[0, 1], [3, 4]])):
        slices = [{"sources": [{"model": str(tmp_path / "a"), "layer_range": each}]} for each in ranges]
        keep = Keep()
        merge({"merge_method": "passthrough", "slices": slices}, tmp_path / result, workers=1, on_event=keep)
        assert bool(keep.list(Warned)) == (name in WARNED), keep.list(Warned)
        if name not in WARNED:
            model, said_of_model = load(kind, tmp_path / result)
            assert said_of_model == said
            assert bool(run(model).isfinite().all())


def test_sentence_transformers(tmp_path: Path) -> None:
    """A BERT with pooling and normalisation, as that library saves it: these are copied."""
    write_models("BertModel", tmp_path)
    modules = [{"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"}]
    modules.append({"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"})
    for name in ("a", "b"):
        (tmp_path / name / "modules.json").write_text(json.dumps(modules))
        (tmp_path / name / "1_Pooling").mkdir()
        (tmp_path / name / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    models = [{"model": str(tmp_path / name), "parameters": {"weight": 1}} for name in ("a", "b")]
    merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "modules.json").read_text()) == modules
    assert "mean_tokens" in (tmp_path / "out" / "1_Pooling" / "config.json").read_text()
