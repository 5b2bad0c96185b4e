"""config.json of a new stack of layers: what is said of single layers follows them."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from raymerge.pipeline.checkpoint.model_config import (
    LAYER_COUNTS,
    Json,
    count_layers,
    layer_counts,
    list_field,
    text_part,
)
from raymerge.pipeline.messages import counted

Origins = Sequence[tuple[Json, int]]
"""For each output layer, the config.json of the model that it comes from and its number there."""

_INDEX_LISTS = (
    "mlp_only_layers", "moe_layers", "attn_layer_indices", "full_attention_layers", "fixed_layers",
    "cross_attention_layers", "hybrid_layer_ids", "full_attn_idxs", "fullatt_block_indexes", "deepstack_visual_indexes",
)  # fmt: skip
"""Lists of layer numbers, as opposed to lists with one entry for each layer."""

_LAYER_LISTS = (
    "attn_type_list", "intermediate_size", "activation_sparsity_pattern", "compress_ratios", "block_configs",
    "num_query_heads", "num_kv_heads", "ffn_multipliers",
)  # fmt: skip
"""Fields that may hold one entry for each layer, and whose names do not say so."""

_FIRST_LAYERS = ("first_k_dense_replace", "num_dense_layers", "num_hash_layers")
"""Numbers of layers at the beginning that are of another kind than the rest."""
_LAST_LAYERS = ("num_kv_shared_layers",)
"""The same at the end."""

_INTERVALS = {"full_attention_interval": "linear_attention", "sliding_window_pattern": "sliding_attention"}
"""Fields that make every n-th layer one of full attention, and what they make of the others; `layer_types` says the
same for each layer (`Qwen3NextConfig`, `Gemma3TextConfig`, `Cohere2Config` of transformers)."""
_SUPERSEDED = {
    **dict.fromkeys(_INTERVALS, "layer_types"),
    "global_attn_every_n_layers": "layer_types",
    "layer_group_size": "layer_types",
    "no_rope_layer_interval": "no_rope_layers",
    "attn_layer_offset": "layers_block_type",
    "attn_layer_period": "layers_block_type",
}
"""Fields that loaders do not look at where a list says the same of each layer."""
_SLIDING_PATTERNS = {"gemma2": 2, "gemma3_text": 6, "cohere2": 4}
"""`sliding_window_pattern` of models whose config.json leaves it out, by model_type."""

_DEPTH_FIELD = re.compile(
    r"interval|_every_|_period|_step$|freq(?:uency)?$|layer_offset|_pattern$|start_layer|layer_start|end_layer|layer_end"
    r"|layer_group|^num_(?!nextn)\w+_layers$|first_k_"
)
"""Fields that may tie a layer's kind to its number in a way that no rule of ours can move."""
_STRIDE = re.compile(r"interval|_every_|_period|_step$|freq(?:uency)?$|pattern$|layer_group")
"""Fields of these that say something of every n-th layer, and nothing at 1."""


def set_no_prediction_layers(config: Json) -> None:
    """State that no layers for multi-token prediction follow the model's own, wherever the config counts them."""
    for part in (config, text_part(config)):
        if "num_nextn_predict_layers" in part:
            part["num_nextn_predict_layers"] = 0


def stack_layers(config: Json, origins: Origins) -> tuple[Json, list[str]]:
    """Return a copy of a config.json for a new stack of layers, and warnings.

    Args:
        config: the donor's.
        origins: of the output layers.
    """
    result = copy.deepcopy(config)
    part = text_part(result)
    old = count_layers(config)
    if old is None:
        return result, [f"config.json has no layer count; the output has {counted(len(origins), 'layer')}"]
    types = [_find_type(origin, layer) or _find_type(config, layer) for origin, layer in origins]
    warnings = _stack_part(part, old, origins, has_types=all(types))
    if part is not result:  # older multimodal configs state the fields of the language model twice
        warnings += _stack_part(result, old, origins, has_types=all(types))
    if _is_moved(old, origins) and "layer_types" not in part and all(types):
        part["layer_types"] = types
    return result, list(dict.fromkeys(warnings))


def read_layer(config: Json, layer: int) -> tuple[Any, ...]:
    """Return all fields of a config.json that tell one layer from another, for comparison within one model."""
    part = text_part(config)
    num_layers = count_layers(config)
    if not num_layers:
        return ()
    said: list[Any] = [_find_type(config, layer)]
    for name, value in sorted(part.items()):
        if name == "layer_types":
            continue
        if name in _INDEX_LISTS and isinstance(value, list):
            said.append(layer in value)
        elif _is_per_layer(name, value, num_layers) or _is_letter_per_layer(name, value, num_layers):
            said.append(repr(value[layer]))
        elif _is_by_number(name, value, num_layers):
            said.append(repr(value.get(str(layer))))
        elif name in _FIRST_LAYERS and type(value) is int:
            said.append(layer < value)
        elif name in _LAST_LAYERS and type(value) is int:
            said.append(layer >= num_layers - value)
        elif (base := _find_base(value, num_layers)) is not None:
            said += [layer + base in numbers for _, numbers in _list_partition(value)]
    return tuple(said)


def _is_moved(old: int, origins: Origins) -> bool:
    return [layer for _, layer in origins] != list(range(old))


def _stack_part(part: Json, old: int, origins: Origins, *, has_types: bool) -> list[str]:
    """Change one section of a config.json, where the count of layers was `old`; return warnings."""
    warnings = []
    counts = layer_counts(part)
    for name, value in list(part.items()):
        base = _find_base(value, old)
        if name in counts or name == "max_window_layers":
            part[name] = len(origins) if value == old else value
        elif name in _INDEX_LISTS and isinstance(value, list):
            part[name] = [k for k, (origin, layer) in enumerate(origins) if layer in list_field(origin, name)]
        elif _is_per_layer(name, value, old):
            part[name] = [_entry(list_field(origin, name), layer, value) for origin, layer in origins]
        elif _is_letter_per_layer(name, value, old):
            given = (text_part(origin).get(name) for origin, _ in origins)
            letters = zip((text if isinstance(text, str) else value for text in given), origins, strict=True)
            part[name] = "".join(_entry(text, layer, value) for text, (_, layer) in letters)
        elif _is_by_number(name, value, old):
            sections = [text_part(origin).get(name) for origin, _ in origins]
            entries = zip((each if isinstance(each, dict) else {} for each in sections), origins, strict=True)
            part[name] = {str(k): e[str(layer)] for k, (e, (_, layer)) in enumerate(entries) if str(layer) in e}
        elif base is not None:
            for key, numbers in _list_partition(value):
                value[key] = [
                    k + base
                    for k, (origin, layer) in enumerate(origins)
                    if layer + base in _numbers(origin, name, key, numbers)
                ]
        elif _is_moved(old, origins) and value:
            count = _recount(name, value, old, origins)
            if count is not None:
                part[name] = count
            elif _is_of_depth(name, value) and not _is_superseded(part, name, has_types=has_types):
                warnings.append(
                    f"config.json: {name} = {value} ties layers to their number and stays as it is; "
                    f"check it against the new stack of {counted(len(origins), 'layer')}"
                )
    return warnings


def _is_per_layer(name: str, value: object, num_layers: int) -> bool:
    is_named = "layer" in name or name.endswith("_types") or name in _LAYER_LISTS
    return is_named and isinstance(value, list) and len(value) == num_layers


def _is_letter_per_layer(name: str, value: object, num_layers: int) -> bool:
    return name == "hybrid_override_pattern" and isinstance(value, str) and len(value) == num_layers


def _is_by_number(name: str, value: object, num_layers: int) -> bool:
    """Tell whether a section has an entry for some layers, by their numbers, as `per_layer_config` of Gemma 4."""
    if "layer" not in name or not isinstance(value, dict) or not value:
        return False
    return all(key.isdecimal() and int(key) < num_layers for key in value)


def _is_of_depth(name: str, value: object) -> bool:
    is_said = isinstance(value, int | str) and name not in LAYER_COUNTS and _DEPTH_FIELD.search(name) is not None
    return is_said and not (value == 1 and _STRIDE.search(name))


def _is_superseded(part: Json, name: str, *, has_types: bool) -> bool:
    better = _SUPERSEDED.get(name.lstrip("_"))
    return isinstance(part.get(better or ""), list) or (name in _INTERVALS and has_types)


def _list_partition(value: object) -> list[tuple[str, list[int]]]:
    """Return the lists of growing numbers in a section of a config."""
    lists = [item for item in value.items() if isinstance(item[1], list)] if isinstance(value, dict) else []
    lists = [(key, numbers) for key, numbers in lists if all(type(number) is int for number in numbers)]
    return [(key, numbers) for key, numbers in lists if numbers == sorted(set(numbers))]


def _find_base(value: object, num_layers: int) -> int | None:
    """Return the number of the first layer in a section whose lists name each layer once, 0 or 1; None for others.

    >>> _find_base({"full_attn_layers": [3], "kda_layers": [1, 2], "head_dim": 8}, 3), _find_base({"ids": [0, 1]}, 3)
    (1, None)
    """
    numbers = sorted(number for _, listed in _list_partition(value) for number in listed)
    return next((base for base in (0, 1) if numbers and numbers == list(range(base, num_layers + base))), None)


def _numbers(config: Json, section: str, key: str, fallback: list[int]) -> list[int]:
    """Return the layers that another model's config lists in a section; those of the donor's where it lists none."""
    return dict(_list_partition(text_part(config).get(section))).get(key, fallback)


def _find_type(config: Json, layer: int) -> str | None:
    """Return the type of a layer where config.json has an interval for it in place of `layer_types`."""
    part = text_part(config)
    if list_field(config, "layer_types"):
        return str(_entry(list_field(config, "layer_types"), layer, [""]))
    pattern = {"sliding_window_pattern": _SLIDING_PATTERNS.get(str(part.get("model_type")))}
    for name, other in _INTERVALS.items():
        interval = part.get(name) or pattern.get(name)
        if type(interval) is int:
            return other if (layer + 1) % interval else "full_attention"
    return None


def _recount(name: str, value: object, old: int, origins: Origins) -> int | None:
    """Return how many first or last layers are of a field's kind in the new stack; None where they lie elsewhere."""
    if type(value) is not int or name not in (*_FIRST_LAYERS, *_LAST_LAYERS):
        return None
    is_first = name in _FIRST_LAYERS
    given = (text_part(origin).get(name) for origin, _ in origins)
    counts = [count if type(count) is int else value for count in given]
    marks = [
        layer < count if is_first else layer >= (count_layers(origin) or old) - count
        for count, (origin, layer) in zip(counts, origins, strict=True)
    ]
    runs = [mark for mark, _ in groupby(marks if is_first else reversed(marks))]
    return sum(marks) if runs in ([True], [False], [True, False]) else None


def _entry(values: Sequence[Any], layer: int, fallback: Sequence[Any]) -> Any:
    return values[layer] if layer < len(values) else fallback[min(layer, len(fallback) - 1)]
