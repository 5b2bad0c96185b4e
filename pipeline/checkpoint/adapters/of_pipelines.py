"""LoRA adapters of diffusion pipelines, as diffusers saves them: one file with the factors of all components."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from raymerge.pipeline.checkpoint.adapters.config import AdapterConfig, parse_adapter_config
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.values import decode
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.open import Stores

PIPELINE_ADAPTER = "pytorch_lora_weights.safetensors"
_METADATA = "lora_adapter_metadata"
_OLD = re.compile(r"\.processor\.to_(q|k|v|out)_lora\.(down|up)\.weight$")
_FACTOR = re.compile(r"\.(?:lora|lora_linear_layer)\.(down|up)\.weight$")
_A = ".lora_A.weight"
_PARTS = {"down": "lora_A", "up": "lora_B"}
_KOHYA = re.compile(r"(?:lora_(?:unet|te\d?|transformer)_|diffusion_model\.)")


def split_components(
    tensors: Sequence[StoredTensor], metadata: Mapping[str, str], url: str
) -> dict[str, tuple[tuple[StoredTensor, ...], AdapterConfig, bool]]:
    """Return an adapter's tensors by component, under peft's names, their config, and whether the file states it.

    Names in the file begin with the component (`unet.`); here they begin with its directory (`unet/`), as those of the
    pipeline's tensors do.

    Args:
        tensors: of the file.
        metadata: of its header, in which newer versions of diffusers keep peft's config.
        url: of the file, for messages.

    Raises:
        CheckpointError: the names are not those of diffusers, or the config is malformed.
    """
    stated = _read_configs(metadata, url)
    found: dict[str, list[StoredTensor]] = {}
    for tensor in tensors:
        component, dot, name = tensor.name.partition(".")
        if not dot or _KOHYA.match(tensor.name):
            raise CheckpointError(
                f"{url}: tensor {tensor.name} is called as in other programs; load the adapter in diffusers"
                " (load_lora_weights, fuse_lora), save the pipeline (save_pretrained), and merge that"
            )
        name = _OLD.sub(_rename_old, name)
        name = _FACTOR.sub(lambda match: f".{_PARTS[match[1]]}.weight", name)
        found.setdefault(component, []).append(replace(tensor, name=f"{component}/{name}"))
    return {
        f"{component}/": (
            tuple(own),
            parse_adapter_config({**stated.get(component, {}), "peft_type": "LORA"}, url),
            component in stated,
        )
        for component, own in found.items()
    }


def read_scales(stores: Stores, tensors: Sequence[StoredTensor], *, is_stated: bool) -> dict[str, float] | None:
    """Return what the product of a module's factors is multiplied with, where it is not 1; None where a config says it.

    Without a config, as in older files, that is a stored `alpha` divided by the rank.

    Args:
        stores: that have the file.
        tensors: of one component, under peft's names.
        is_stated: whether there is a config.

    Raises:
        CheckpointError: an alpha is no number or that of no update, or there are a config and alphas.
        FetchError: the file could not be read.
    """
    alphas = [tensor for tensor in tensors if tensor.name.endswith(".alpha")]
    if is_stated and not alphas:
        return None
    for tensor in alphas:
        if is_stated or tensor.num_elements != 1 or not DTYPES[tensor.dtype].is_mergeable:
            raise CheckpointError(
                f"{tensor.file.url}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}; one number is needed, and no"
                f" config beside it ({_METADATA} in the header)"
            )
    contents = stores.read_ranges([piece for tensor in alphas for piece in tensor.ranges(0, 1)])
    values = {
        tensor.name.removesuffix(".alpha"): float(decode(bytes(content), tensor.dtype)[0])
        for tensor, content in zip(alphas, contents, strict=True)
    }
    ranks = {
        tensor.name.removesuffix(_A): tensor.shape[0] for tensor in tensors if tensor.name.endswith(_A) and tensor.shape
    }
    if strange := sorted(values.keys() - ranks.keys()):
        raise CheckpointError(
            f"{tensors[0].file.url}: {strange[0]}.alpha belongs to no update, and would scale one; load the adapter in"
            " diffusers (load_lora_weights, fuse_lora), save the pipeline (save_pretrained), and merge that"
        )
    return {module: values[module] / rank for module, rank in ranks.items() if rank and module in values}


def _rename_old(match: re.Match[str]) -> str:
    """Return the module and factor that the first LoRAs of diffusers meant by an attention's processor."""
    module = "to_out.0" if match[1] == "out" else f"to_{match[1]}"
    return f".{module}.{_PARTS[match[2]]}.weight"


def _read_configs(metadata: Mapping[str, str], url: str) -> dict[str, dict[str, Any]]:
    """Return the fields of peft's config of each component, from names such as `unet.lora_alpha`."""
    text = metadata.get(_METADATA)
    if text is None:
        return {}
    try:
        content = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{url}: {_METADATA} in the header is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{url}: {_METADATA} in the header is no mapping")
    configs: dict[str, dict[str, Any]] = {}
    for name, value in content.items():
        component, _, key = name.partition(".")
        configs.setdefault(component, {})[key] = value
    return configs
