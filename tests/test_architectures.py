"""Every causal language model that transformers can make without a download: merged, stacked, pruned, and loaded."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as ARCHITECTURES

from raymerge import RaymergeError, merge
from raymerge.pipeline.progress.events import Event, Warned

SIZES: dict[str, Any] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), 64),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 64),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embed_dim", "embedding_size"), 32),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "n_inner", "decoder_ffn_dim", "encoder_ffn_dim"), 48),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), 4),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "encoder_layers"), 2),
    **dict.fromkeys(("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "linear_key_head_dim", "linear_value_head_dim"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "mamba_d_head"), 16),
    **dict.fromkeys(("mamba_d_state", "state_size"), 8),
    **dict.fromkeys(("mamba_n_groups", "n_groups", "n_group", "topk_group", "first_k_dense_replace"), 1),
    **{"num_experts_per_tok": 2, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "mamba_n_heads": 4},
    **{"hidden_size_per_layer_input": 6, "laurel_rank": 4, "time_step_rank": 4},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2},
}
MAX_PARAMETERS = 3_000_000
ENOUGH = 140
"""Architectures that these sizes make small models of; the others want sizes that fit together in some other way."""


def make_config(kind: str) -> PretrainedConfig:
    factory: type[PretrainedConfig] = CONFIG_MAPPING[kind]
    fields = {field.name for field in dataclasses.fields(factory)} if dataclasses.is_dataclass(factory) else set()
    known = {*inspect.signature(factory).parameters, *fields, *factory.attribute_map}
    return factory(**{name: size for name, size in SIZES.items() if name in known})


def find_class(kind: str) -> Any:
    names = ARCHITECTURES[kind]
    return getattr(transformers, names if isinstance(names, str) else names[0])


def list_small() -> list[str]:
    found = []
    for kind in ARCHITECTURES:
        try:
            with torch.device("meta"):
                model = find_class(kind)(make_config(kind))
        except Exception:  # of any kind: sizes that do not fit, or a package that is not here
            continue
        if sum(parameter.numel() for parameter in model.parameters()) < MAX_PARAMETERS:
            found.append(kind)
    return found


def load(kind: str, directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model; return also what transformers says of its tensors, where that is anything."""
    model, info = find_class(kind).from_pretrained(directory, output_loading_info=True)
    return model, {name: sorted(map(str, said)) for name, said in info.items() if said}


def check_whole_merges(kind: str, directory: Path) -> None:
    """Merge a model with itself, and make sure that it is the same model."""
    model, said = load(kind, directory / "a")
    shutil.copytree(directory / "a", directory / "b")
    models = [{"model": str(directory / name)} for name in ("a", "b")]
    for method, more in (("linear", {"weight": 1}), ("slerp", {"t": 0.5})):
        base = {"base_model": models[0]["model"]} if method == "slerp" else {}
        merge({"merge_method": method, "models": models, "parameters": more, **base}, directory / method, workers=1)
        merged, said_of_merged = load(kind, directory / method)
        assert said_of_merged == said
        expected = model.state_dict()
        assert merged.state_dict().keys() == expected.keys()
        assert [name for name, x in merged.state_dict().items() if not torch.equal(x, expected[name])] == []


def check_stacks(kind: str, directory: Path) -> None:
    """Stack and prune a model's layers: what transformers then loads is whole, or else there was a warning."""
    _, said = load(kind, directory / "a")
    for name, ranges in (("stack", ([0, 2], [1, 4])), ("prune", ([0, 1], [3, 4]))):
        slices = [{"sources": [{"model": str(directory / "a"), "layer_range": each}]} for each in ranges]
        told: list[Event] = []
        try:
            merge({"merge_method": "passthrough", "slices": slices}, directory / name, workers=1, on_event=told.append)
        except RaymergeError:
            continue
        if any(isinstance(event, Warned) for event in told):
            continue
        assert load(kind, directory / name)[1] == said, name


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_causal_language_model(tmp_path: Path) -> None:
    kinds = list_small()
    assert len(kinds) >= ENOUGH
    problems = []
    for kind in kinds:
        directory = tmp_path / kind
        torch.manual_seed(1)
        find_class(kind)(make_config(kind)).save_pretrained(directory / "a")
        for check in (check_whole_merges, check_stacks):
            try:
                check(kind, directory)
            except Exception as error:  # of any kind: every architecture is to be tried
                problems.append(f"{kind}, {check.__name__}: {type(error).__name__}: {str(error)[:500]}")
        shutil.rmtree(directory)
    assert problems == []
