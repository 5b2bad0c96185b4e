"""config.json: what a merge reads from it, and what it changes in the output's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.messages import shown

Json = dict[str, Any]

LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks")
_DECODER_COUNTS = ("num_decoder_layers", "decoder_layers")
_MAX_LAYERS = 100_000
_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
_MEANING_FIELDS = (
    "model_type", "rope_theta", "rope_scaling", "partial_rotary_factor", "rotary_dim", "rotary_pct", "alibi",
    "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps",
    "hidden_act", "hidden_activation", "activation_function",
    "num_attention_heads", "num_key_value_heads", "head_dim", "n_head", "multi_query",
    "sliding_window", "layer_types", "use_parallel_residual", "parallel_attn",
    "attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar", "logit_scale",
    "embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling",
    "num_experts_per_tok", "norm_topk_prob", "routed_scaling_factor", "scoring_func", "n_group", "topk_group",
)  # fmt: skip
"""Fields that give the same weights another meaning."""


_NONE_IS_MEANT = ("model_type", "rope_scaling")
"""Fields without a default, in whatever architecture: where they are left out, there is none."""


def text_part(config: Json) -> Json:
    """Return the part of a config.json that describes the language model: a sub-config, or the whole."""
    for key in _TEXT_PARTS:
        part = config.get(key)
        if isinstance(part, dict) and _layer_count_key(inner := text_part(part)):
            return inner
    return config


def layer_counts(part: Json) -> tuple[str, ...]:
    """Return the fields of a section that may count the layers of its main stack: the decoder, if there is one."""
    return _DECODER_COUNTS if any(_is_count(part.get(key)) for key in _DECODER_COUNTS) else LAYER_COUNTS


def count_layers(config: Json) -> int | None:
    """Return the number of layers that config.json states, if it does."""
    part = text_part(config)
    key = _layer_count_key(part)
    return part[key] if key else None


def ties_embeddings(config: Json) -> bool | None:
    """Return `tie_word_embeddings` of a config.json; None where it is silent.

    Versions of transformers write it at the top, into the language model's part, or into both, and newer ones take
    either for true.
    """
    stated = _list_tying(config)
    return True if True in stated else False if False in stated else None


def contradicts_itself_on_tying(config: Json) -> bool:
    """Tell whether the language model's part has another `tie_word_embeddings` than the top."""
    return len(set(_list_tying(config))) == 2


def _list_tying(config: Json) -> list[bool]:
    stated = (part.get("tie_word_embeddings") for part in (config, text_part(config)))
    return [value for value in stated if isinstance(value, bool)]


def set_tied(config: Json, tied: bool) -> None:
    """State `tie_word_embeddings`, wherever the config has it already, and at the top."""
    part = text_part(config)
    if "tie_word_embeddings" in part:
        part["tie_word_embeddings"] = tied
    config["tie_word_embeddings"] = tied


def set_dtype(config: Json, dtype: str) -> None:
    """State the weights' dtype, under the keys that the config uses.

    Args:
        config: changed in place, sub-configs included.
        dtype: torch's word for it, such as `bfloat16`.
    """
    for part in list_sections(config):
        for key in ("dtype", "torch_dtype"):
            if part.get(key) is not None or (part is config and key in part):
                part[key] = dtype
    is_of_diffusers = "_class_name" in config  # whose configs hold arguments of the class, and no dtype is one
    if "dtype" not in config and "torch_dtype" not in config and not is_of_diffusers:
        config["torch_dtype"] = dtype


def list_sections(node: object) -> Iterator[Json]:
    """Yield a config.json and its sections, however deep they lie: Qwen2.5-Omni has some in `thinker_config`."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from list_sections(child)


def dump_config(config: Json) -> str:
    """Return the text of a config.json."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def compare_configs(configs: Sequence[tuple[ModelRef, Json]], *, is_stack: bool = False) -> list[str]:
    """Return a warning for each field that gives the weights another meaning and differs between the inputs.

    Args:
        configs: the donor's first.
        is_stack: whether layers are stacked anew, so that lists with an entry for each layer follow them.
    """
    warnings = []
    unsaid: dict[str, list[str]] = {}
    for field in _MEANING_FIELDS:
        values = [(model, _meaning(config, field)) for model, config in configs]
        effective = [
            _default(config, field) if value is None else value
            for (_, config), (_, value) in zip(configs, values, strict=True)
        ]
        stated = [value for _, value in values if value is not None]
        if not stated or all(value == effective[0] for value in effective[1:]):
            continue
        if field not in _NONE_IS_MEANT and all(value == stated[0] for value in stated):
            for model, value in values:
                if value is None:
                    unsaid.setdefault(str(model), []).append(f"{field} {shown(stated[0])}")
        else:
            given = "; ".join(f"{model}: {'not given' if value is None else value}" for model, value in values)
            outcome = f"the output gets {values[0][0]}'s"
            if is_stack and field == "layer_types" and list_field(configs[0][1], field):
                outcome = "each layer of the output keeps that of the model it comes from, the first in its slice"
            warnings.append(
                f"config.json: {field} differs, so the same weights mean different things in the inputs ({given}); "
                + outcome
            )
    warnings += [
        f"config.json: {model} leaves out what others state; it means the same where these are the defaults of its"
        f" architecture: {', '.join(fields)}"
        for model, fields in unsaid.items()
    ]
    return warnings


def _layer_count_key(part: Json) -> str | None:
    return next((key for key in layer_counts(part) if _is_count(part.get(key))), None)


def _is_count(value: object) -> bool:
    return type(value) is int and 0 < value <= _MAX_LAYERS


def list_field(config: Json, field: str) -> list[Any]:
    """Return a list of the language model's part; an empty one where the field is none."""
    value = text_part(config).get(field)
    return value if isinstance(value, list) else []


def _meaning(config: Json, field: str) -> object:
    """A field's effective value: newer configs nest the rotary fields, and switch sliding windows off by a flag."""
    part = text_part(config)
    rope = part.get("rope_parameters")
    rope = rope if isinstance(rope, Mapping) else {}
    of_full = rope.get("full_attention")  # one set for each type of layer
    rope = of_full if isinstance(of_full, Mapping) else rope
    if field in ("rope_theta", "partial_rotary_factor"):
        return rope.get(field, part.get(field))
    if field == "rope_scaling":
        scaling = part.get(field) or {
            key: value for key, value in rope.items() if key not in ("rope_theta", "partial_rotary_factor")
        }
        if not isinstance(scaling, Mapping):
            return scaling
        scaling = {key: value for key, value in scaling.items() if value is not None}
        kind = scaling.pop("rope_type", scaling.pop("type", "default"))
        return {"rope_type": kind, **scaling} if scaling or kind != "default" else None
    if field == "sliding_window" and part.get("use_sliding_window") is False:
        return None
    if field == "layer_types" and all(kind == "full_attention" for kind in list_field(config, field)):
        return None
    return part.get(field)


def _default(config: Json, field: str) -> object:
    """The default of transformers for a field that is not given; newer versions write these out."""
    part = text_part(config)
    num_heads = part.get("num_attention_heads")
    if field == "rope_theta":
        return 10000.0
    if field == "num_key_value_heads":
        return num_heads
    if field == "head_dim" and isinstance(num_heads, int) and num_heads and isinstance(part.get("hidden_size"), int):
        return part["hidden_size"] // num_heads
    return None
