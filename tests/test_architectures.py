"""Models of every architecture that transformers can make without a download: merged, stacked, pruned, and loaded."""

from __future__ import annotations

import dataclasses
import inspect
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto
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
    **{"image_size": 32, "patch_size": 8, "num_channels": 3, "depth": 2, "depths": [1, 1, 1, 1]},
    **{"out_hidden_size": 32, "projection_dim": 16},
    "initializer_range": 0.02,  # that of BLIP and SAM, 1e-10, makes vectors that slerp takes for zero, as in mergekit
}
MAX_PARAMETERS = 3_000_000
NUM_PARTS = 12
"""Each takes a minute or less on a slow machine."""
ENOUGH = 9
"""Causal models of each part that these sizes make small ones of: 159 in all with transformers 5.23.

The others want sizes that fit together otherwise, or packages that are not here. There are no further exceptions.
"""
ENOUGH_OTHERS = 14
"""The same of multimodal models, encoder-decoders and bare ones: 260 in all, 97 of them for conditional generation."""


def make_config(factory: type[PretrainedConfig], default: PretrainedConfig | None = None) -> PretrainedConfig:
    """Return a small config; its sections, too, of the types that they have in the default one."""
    default = default or factory()
    fields = {field.name for field in dataclasses.fields(factory)} if dataclasses.is_dataclass(factory) else set()
    known = {*inspect.signature(factory).parameters, *fields, *factory.attribute_map}
    sections = {name: getattr(default, name, None) for name in factory.sub_configs}
    small = {
        name: make_config(type(part), part) for name, part in sections.items() if isinstance(part, PretrainedConfig)
    }
    return factory(**{name: size for name, size in SIZES.items() if name in known} | small)


def list_causal() -> list[str]:
    return list(dict.fromkeys(names if isinstance(names, str) else names[0] for names in ARCHITECTURES.values()))


def list_small(names: Iterable[str]) -> list[Any]:
    return [kind for kind in (getattr(transformers, name) for name in names) if is_small(kind)]


def is_small(kind: Any) -> bool:
    """Tell whether a class takes these sizes and makes a small model of them, with the packages that are here."""
    try:
        with torch.device("meta"):
            model = kind(make_config(kind.config_class))
    except Exception:  # of any kind
        return False
    return bool(sum(parameter.numel() for parameter in model.parameters()) < MAX_PARAMETERS)


def list_others() -> list[str]:
    """Return multimodal and encoder-decoder classes, and bare models of what has none of these and no causal one."""
    names: dict[str, str] = {}
    for table, content in vars(modeling_auto).items():
        if table.startswith("MODEL") and table.endswith("MAPPING_NAMES"):
            for kind, found in content.items():
                names |= dict.fromkeys([found] if isinstance(found, str) else found, kind)
    whole = {name: kind for name, kind in names.items() if name.endswith("ForConditionalGeneration")}
    covered = {*whole.values(), *ARCHITECTURES}
    bare = [name for name, kind in names.items() if name.endswith("Model") and kind not in covered]
    return [name for name in (*whole, *bare) if hasattr(transformers, name)]


def load(kind: Any, directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model; return also what transformers says of its tensors, where that is anything."""
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    return model, {name: sorted(map(str, said)) for name, said in info.items() if said}


def check_whole_merges(kind: Any, directory: Path) -> None:
    """Merge a model with itself, and make sure that it is the same model."""
    model, said = load(kind, directory / "a")
    expected = model.state_dict()
    shutil.copytree(directory / "a", directory / "b")
    models = [{"model": str(directory / name)} for name in ("a", "b")]
    for method, more in (("linear", {"weight": 1}), ("slerp", {"t": 0.5})):
        base = {"base_model": models[0]["model"]} if method == "slerp" else {}
        merge({"merge_method": method, "models": models, "parameters": more, **base}, directory / method, workers=1)
    merged, said_of_merged = load(kind, directory / "linear")
    assert said_of_merged == said
    assert_same(merged.state_dict(), expected)
    assert_same(*(load_file(directory / method / "model.safetensors") for method in ("slerp", "linear")))


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert [name for name, x in found.items() if not torch.equal(x, expected[name])] == []


def check_stacks(kind: Any, directory: Path) -> None:
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


def check_all(kinds: Iterable[Any], checks: Iterable[Callable[[Any, Path], None]], directory: Path) -> list[str]:
    """Return what is wrong, of all classes."""
    problems = []
    for kind in kinds:
        torch.manual_seed(1)
        kind(make_config(kind.config_class)).save_pretrained(directory / "a")
        for check in checks:
            try:
                check(kind, directory)
            except Exception as error:  # of any kind: every architecture is to be tried
                problems.append(f"{kind.__name__}, {check.__name__}: {type(error).__name__}: {str(error)[:500]}")
        shutil.rmtree(directory)
    return problems


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_causal_language_model(part: int, tmp_path: Path) -> None:
    kinds = list_small(list_causal()[part::NUM_PARTS])
    assert len(kinds) >= ENOUGH
    assert check_all(kinds, (check_whole_merges, check_stacks), tmp_path / "models") == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_multimodal_models_encoder_decoders_and_bare_ones(part: int, tmp_path: Path) -> None:
    kinds = list_small(list_others()[part::NUM_PARTS])
    assert len(kinds) >= ENOUGH_OTHERS
    assert check_all(kinds, (check_whole_merges,), tmp_path / "models") == []
