"""Quantised checkpoints, told by config.json, by other files, and by the tensors where none of these says so."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.names import OPTIONAL_BUFFERS
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.messages import counted

QUANTISED_FILES = ("hf_quant_config.json", "quantize_config.json", "quant_config.json")
"""Side files that say how weights are quantised."""

_SECTIONS = ("quantization_config", "compression_config")
_AT_LOAD = "bitsandbytes"
"""Quantises whole weights when they are loaded: a fine-tune that was merged back to 16 bits often keeps its section."""

_SCALE = re.compile(
    r"(?<![^.])(?:absmax|quant_map|quant_state\.[\w.]+|SCB|q?zeros|zero_point|g_idx|codebooks?"
    r"|(?!logit|layer|norm|residual)(?:\w+_)?scales?(?:_inv)?)$"
)
"""The last part of the names of scales, zero points and codebooks."""
_WIDE = ("I64", "U64", "BOOL", "C64")
"""Dtypes of positions and masks, never of packed values."""


@dataclass(frozen=True, slots=True)
class Quantisation:
    """Evidence that a checkpoint is quantised."""

    stated: tuple[str, ...] = ()
    """Places that say so, such as `config.json: quantization_config (fp8)`."""
    packed: tuple[StoredTensor, ...] = ()
    """Tensors whose stored numbers are not their values."""
    is_at_load: bool = False
    """Whether all that says so may mean that whole weights are quantised when they are loaded."""

    def explain(self, decoded: Collection[str] = ()) -> str | None:
        """Return why the tensors cannot be taken as they are stored, and the way out; None where they can.

        Args:
            decoded: names of packed tensors that a view makes values of.
        """
        packed = [tensor for tensor in self.packed if tensor.name not in decoded]
        stated = ", ".join(self.stated)
        if packed:
            first = packed[0]
            needed = "" if stated else "; for that, its quantization_config has to be back in config.json"
            return (
                f"quantised ({stated or 'by its tensors; config.json does not say so'}):"
                f" {counted(len(packed), 'tensor')} of packed numbers, such as {first.name} ({first.dtype}); quantised"
                " checkpoints are not supported yet; take the model that it was made from, or dequantise first: load it"
                " in transformers with dequantize=True in its quantization config (FP8, MXFP4), or call the loaded"
                f" model's dequantize() (bitsandbytes), and save it{needed}"
            )
        if not self.stated or self.packed or self.is_at_load:
            return None
        return (
            f"quantised ({stated}), and yet none of its tensors holds packed numbers; if it was dequantised, take that"
            " out of its files; a model that is made to be quantised when it is loaded is not supported"
        )


def find_quantisation(
    config: Mapping[str, Any], files: Iterable[str], tensors: Mapping[str, StoredTensor]
) -> Quantisation:
    """Return the evidence that a checkpoint is quantised.

    Args:
        config: its config.json.
        files: relative names of its side files.
        tensors: its tensors by name.
    """
    found = [name for name in files if name in QUANTISED_FILES]
    stated = list(found)
    methods = set()
    todo: list[tuple[str, Mapping[str, Any]]] = [("", config)]
    while todo:
        prefix, section = todo.pop()
        for key, value in section.items():
            if key in _SECTIONS and value:
                method = str(value.get("quant_method") or "") if isinstance(value, dict) else ""
                methods.add(method)
                stated.append(f"config.json: {prefix}{key}" + (f" ({method})" if method else ""))
            elif isinstance(value, dict):
                todo.append((f"{prefix}{key}.", value))
    scaled = {prefix for name in tensors for prefix in _list_scaled(name)}
    packed = [tensor for tensor in tensors.values() if _is_packed(tensor, scaled, is_stated=bool(stated))]
    return Quantisation(tuple(stated), tuple(packed), methods == {_AT_LOAD} and not found)


def drop_quantisation(config: dict[str, Any]) -> None:
    """Take out of a config.json, sub-configs included, what says that its weights are quantised."""
    for key, value in list(config.items()):
        if key in _SECTIONS:
            del config[key]
        elif isinstance(value, dict):
            drop_quantisation(value)


def _list_scaled(name: str) -> Iterable[str]:
    """Return the prefixes of tensors that a tensor may be the scale of, by its name.

    >>> _list_scaled("layers.0.q.weight.absmax"), _list_scaled("mlp.experts.up_proj_scales"), _list_scaled("a.bias")
    (['layers.0.q.weight'], ['mlp.experts', 'mlp.experts.up_proj'], [])
    """
    match = _SCALE.search(name)
    if match is None:
        return []
    module, own = name[: match.start()], re.sub(r"_?(weight_)?scales?(_inv)?$", "", match[0])
    return [*([module[:-1]] if module else []), *([module + own] if own not in ("", match[0]) else [])]


def _is_packed(tensor: StoredTensor, scaled: Collection[str], *, is_stated: bool) -> bool:
    dtype = DTYPES[tensor.dtype]
    if dtype.is_mergeable or tensor.dtype in _WIDE:
        return False
    if tensor.dtype.startswith(("F8", "F6", "F4")):
        return True
    if len(tensor.shape) < 2 or tensor.name.endswith((*OPTIONAL_BUFFERS, "mask")):
        return False
    return is_stated or tensor.name in scaled or tensor.name.rpartition(".")[0] in scaled
