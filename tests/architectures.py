"""Small models of any architecture, as transformers makes them."""

from __future__ import annotations

import dataclasses
import inspect
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig, PreTrainedModel

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


def make_config(
    factory: type[PretrainedConfig], default: PretrainedConfig | None = None, **changes: Any
) -> PretrainedConfig:
    """Return a small config; its sections, too, of the types that they have in the default one.

    Args:
        factory: the class.
        default: an instance, to tell what is in it.
        changes: fields with other sizes than usual; those of a section as a mapping.
    """
    default = default or factory()
    fields = {field.name for field in dataclasses.fields(factory)} if dataclasses.is_dataclass(factory) else set()
    known = {*inspect.signature(factory).parameters, *fields, *factory.attribute_map}
    sections = {name: getattr(default, name, None) for name in factory.sub_configs}
    small = {
        name: make_config(type(part), part, **changes.pop(name, {}))
        for name, part in sections.items()
        if isinstance(part, PretrainedConfig)
    }
    return factory(**{name: size for name, size in SIZES.items() if name in known} | small | changes)


def load(kind: Any, directory: Path) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Load a model; return also what transformers says of its tensors, where that is anything."""
    model, info = kind.from_pretrained(directory, output_loading_info=True)
    return model, {name: sorted(map(str, said)) for name, said in info.items() if said}
