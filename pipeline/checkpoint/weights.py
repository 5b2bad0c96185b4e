"""The files that hold a model's tensors: those that loaders take, where there are several."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.pipeline.checkpoint.files import check_name, index_of, is_adapter, is_weights
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.seam import Storage

EXPLICIT = "transformers_weights"
"""The field of config.json with which a model names its file of weights, or its index."""
GO_ON = "--trust-headers"
_MAX_INDEX_NBYTES = 512 * 2**20
_STEM, _DIFFUSERS_STEM = "model", "diffusion_pytorch_model"
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_CONVERT_PIPELINE = (
    "python -c \"from diffusers import DiffusionPipeline as P; P.from_pretrained('IN').save_pretrained('OUT')\""
)
_SHARD = re.compile(r"(?P<stem>(?:(?:diffusion_)?pytorch_)?model)-(?P<number>\d{5})-of-(?P<count>\d{5})\.safetensors")


@dataclass(frozen=True, slots=True)
class Weights:
    """The files that hold a model's tensors."""

    names: tuple[str, ...]
    """Relative to the model, sorted."""
    index: str = ""
    """The index file that names them; empty where there is none, or it is ignored."""
    weight_map: Mapping[str, str] | None = None
    """Tensor to file name as in the index."""
    warnings: tuple[str, ...] = ()


def stem_of(config: Mapping[str, Any]) -> str:
    """Return what a model's files of weights are called, before the number of a shard: diffusers' word, or the usual.

    >>> stem_of({"_class_name": "UNet2DConditionModel"}), stem_of({"model_type": "llama"})
    ('diffusion_pytorch_model', 'model')
    """
    return _DIFFUSERS_STEM if is_of_diffusers(config) else _STEM


def is_of_diffusers(config: Mapping[str, Any]) -> bool:
    """Tell whether a config.json is that of a diffusers model."""
    return "_class_name" in config


def find_weights(
    storage: Storage, url: str, files: Mapping[str, StoredFile], config: Mapping[str, Any], *, trust_headers: bool
) -> Weights:
    """Return the files that hold a model's tensors: those that transformers loads.

    It takes the file that config.json names, else `model.safetensors`, else what the index names. Other loaders prefer
    the index; where both are complete, nobody can tell which is the model. Models of diffusers have another stem than
    `model`, and where there is nothing else, a variant such as `model.fp16.safetensors` is taken.

    Args:
        storage: that has the model.
        url: the model's directory.
        files: all that is there.
        config: config.json.
        trust_headers: whether to go by the files as transformers does, where loaders disagree or the index is missing.

    Raises:
        CheckpointError: there are none, some are missing, or loaders disagree on them.
        FetchError: the store refuses or is down.
    """
    explicit = config.get(EXPLICIT)
    if isinstance(explicit, str):
        check_name(explicit, url)
        if explicit not in files:
            raise CheckpointError(f"{url}: {explicit} is missing, which config.json names ({EXPLICIT})")
        if explicit.endswith(".index.json"):
            return _find_indexed(storage, url, files, explicit, read_weight_map(storage, f"{url}/{explicit}"))
        if not explicit.endswith(".safetensors"):
            raise CheckpointError(f"{url}: config.json names {explicit} ({EXPLICIT}), which is not a .safetensors file")
        return Weights((explicit,))
    stem = stem_of(config)
    single, index = f"{stem}.safetensors", index_of(stem)
    if index not in files:
        if single in files:
            return Weights((single,))
        return _find_variant(storage, url, files, stem) or _find_unindexed(storage, url, files, stem, trust_headers)
    weight_map = read_weight_map(storage, f"{url}/{index}")
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in files]
    if single not in files or single in names:
        return _find_indexed(storage, url, files, index, weight_map)
    if not missing and not trust_headers:
        raise CheckpointError(
            f"{url}: there are two models: {single}, which transformers loads, and the {counted(len(names), 'file')}"
            f" ({listing(names)}) that {index} names, which vLLM and diffusers load; delete those of the earlier save"
            f" (with {index}, if it names them), or give {GO_ON} to take {single} as transformers does"
        )
    why = f"it names files that are missing ({listing(missing)})" if missing else f"{GO_ON} is given"
    return Weights((single,), warnings=(f"{single} is taken, as transformers does, and {index} ignored: {why}",))


def read_weight_map(storage: Storage, url: str) -> dict[str, str]:
    """Return which file holds each tensor, by an index file whose paths stay in its directory.

    Raises:
        CheckpointError: it is malformed.
        FetchError: the store refuses or is down.
    """
    download = storage.advise_download(url.rpartition("/")[0])
    weight_map = read_json(storage, url, _MAX_INDEX_NBYTES).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{url}: weight_map must be a mapping of tensor to file, and not empty; {download}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(f"{url}: weight_map[{tensor!r}] is {name!r:.200}, not the name of a file; {download}")
    for name in sorted(set(weight_map.values())):
        check_name(name, url)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{url}: weight_map names {name!r}, which is not a .safetensors file; {download}")
    return weight_map


def read_json(storage: Storage, url: str, max_nbytes: int) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        CheckpointError: it is none, or too large.
        FetchError: the store refuses or is down.
    """
    download = storage.advise_download(url.rpartition("/")[0])
    nbytes = storage.stat(url).nbytes
    if nbytes > max_nbytes:
        raise CheckpointError(f"{url}: {nbytes:,} bytes, at most {max_nbytes:,} are expected; {download}")
    try:
        value = parse_json(storage.read(url, max_nbytes).decode())
        json.dumps(value, ensure_ascii=False).encode()
    except ValueError as error:
        raise CheckpointError(f"{url}: not JSON in UTF-8: {error}; {download}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{url}: a JSON {type(value).__name__}, an object is expected; {download}")
    return value


def _find_indexed(
    storage: Storage, url: str, files: Mapping[str, StoredFile], index: str, weight_map: Mapping[str, str]
) -> Weights:
    """Return the files that an index names."""
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if name not in files]
    if missing:
        raise CheckpointError(
            f"{url}: {listing(missing)} missing, of {counted(len(names), 'file')} that {index} names;"
            f" {storage.advise_download(url)}"
        )
    return Weights(tuple(names), index, weight_map)


def _find_variant(storage: Storage, url: str, files: Mapping[str, StoredFile], stem: str) -> Weights | None:
    """Return the files of a model of which only a variant is there, such as that in half precision."""
    single = re.compile(rf"{stem}\.(?P<variant>\w+)\.safetensors")
    indexed = re.compile(rf"{stem}\.safetensors\.index\.(?P<variant>\w+)\.json")
    found = {name: match["variant"] for name in files if (match := single.fullmatch(name) or indexed.fullmatch(name))}
    if not found:
        return None
    if len(found) > 1:
        raise CheckpointError(
            f"{url}: no {stem}.safetensors, and several variants of it: {listing(sorted(found))}; delete all but one"
        )
    ((name, variant),) = found.items()
    warning = f"there is only the variant {variant} ({name}), which is taken; the output's files are called {stem}"
    if not name.endswith(".json"):
        return Weights((name,), warnings=(warning,))
    weights = _find_indexed(storage, url, files, name, read_weight_map(storage, f"{url}/{name}"))
    return Weights(weights.names, weights.index, weights.weight_map, (warning,))


def _find_unindexed(
    storage: Storage, url: str, files: Mapping[str, StoredFile], main: str, trust_headers: bool
) -> Weights:
    """Return the shards of a model whose index is missing, as far as their names say that none of them is."""
    shards = {name: found for name in files if (found := _SHARD.fullmatch(name))}
    index = index_of(main)
    if not shards:
        raise explain_no_weights(storage, url, files, main)
    stem, count = max((found["stem"], found["count"]) for found in shards.values())
    expected = [f"{stem}-{number:05d}-of-{count}.safetensors" for number in range(1, int(count) + 1)]
    missing = [name for name in expected if name not in shards]
    if missing:
        raise CheckpointError(
            f"{url}: {index} is missing, and so are {listing(missing)}; {storage.advise_download(url)}"
        )
    if others := sorted(set(shards).difference(expected)):
        raise CheckpointError(
            f"{url}: {index} is missing, and there are shards of two models: {listing(expected)}; {listing(others)}."
            f" Delete those of the earlier save, or {storage.advise_download(url)}"
        )
    if not trust_headers:
        raise CheckpointError(
            f"{url}: {index} is missing beside {counted(len(expected), 'shard')} ({listing(expected)});"
            f" {storage.advise_download(url)}, or give {GO_ON} to go by what the shards' headers hold"
        )
    return Weights(tuple(expected), warnings=(f"{index} is missing: the tensors are those that the shards hold",))


def explain_no_weights(
    storage: Storage, url: str, files: Mapping[str, StoredFile], stem: str = _STEM
) -> CheckpointError:
    """Return the error for weights in another form than `model.safetensors`, with the next step."""
    expected = f"neither {stem}.safetensors nor {index_of(stem)}"
    library = "transformers" if stem == _STEM else "diffusers"
    there = [name for name in files if is_weights(name)]
    if any(is_adapter(name) for name in there):
        return CheckpointError(
            f"{url}: a LoRA adapter ({listing(there)}), not a whole model; name it after its base, as MODEL+ADAPTER"
        )
    if any(name.endswith(".gguf") for name in there):
        return CheckpointError(
            f"{url}: only GGUF ({listing(there)}), which is quantised;"
            f" merge the model that it was made from, or convert it: {_convert(', gguf_file=...')}"
        )
    safetensors = [name for name in there if name.endswith(".safetensors")]
    if safetensors:
        return CheckpointError(
            f"{url}: {expected}, but {listing(safetensors)}; that is another layout than that of"
            f" {library}. Download the model in that layout, or convert it"
        )
    pickles = [name for name in there if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            f"{url}: only pickled weights ({listing(pickles)}), which can run code when they are loaded;"
            f" if you trust them, convert them to safetensors: {_convert() if stem == _STEM else _CONVERT_PIPELINE}"
        )
    return CheckpointError(f"{url}: no weights: {expected}; {storage.advise_download(url)}")


def _convert(arguments: str = "") -> str:
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
        f" M.from_pretrained('IN'{arguments}).save_pretrained('OUT', safe_serialization=True);"
        f" T.from_pretrained('IN'{arguments}).save_pretrained('OUT')\""
    )
