"""Input checkpoints: which files a model consists of, before any tensor is looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import CheckpointError, FetchError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.redact import redact
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage
from raymerge.pipeline.urls import is_url, scheme_of, suggest_directory

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_MAX_CONFIG_NBYTES = 16 * 2**20
_MAX_INDEX_NBYTES = 512 * 2**20
_WEIGHT_SUFFIXES = (
    ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".msgpack", ".ckpt",
    ".ot", ".tflite", ".pkl", ".npz", ".npy", ".distcp", ".mlmodel", ".mar", ".nemo",
)  # fmt: skip
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")
_REWRITTEN = {CONFIG, "README.md", "mergekit_config.yml", MANIFEST, FIGURES}
_OF_TRAINING = re.compile(r"(checkpoint-[^/]*|runs)/|(.*/)?adapter_config\.json$")
"""Files that a trainer leaves beside the model, and that say nothing about it."""
HUB_NAME = re.compile(r"(?!(?:models|datasets|spaces)/)[\w-][\w.-]*/[\w-][\w.-]*")
"""A model in a config that is no directory here is a repository if it looks like this."""

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""Directories of repositories in the Hub's cache."""

_DOWNLOAD = "download the checkpoint again"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model's files."""

    model: ModelRef
    url: str
    """The directory that holds them; absolute, and at a revision that does not move."""
    config: dict[str, Any]
    """config.json, parsed."""
    config_text: str
    weight_files: tuple[StoredFile, ...]
    """The safetensors files that hold the tensors, by name."""
    weight_map: Mapping[str, str] | None
    """Tensor to file name as in `model.safetensors.index.json`; None where there is a single file."""
    side_files: tuple[tuple[str, StoredFile], ...]
    """Tokenizer and everything else that goes along with the weights: relative name, file."""
    other_weights: tuple[str, ...]
    """Relative names of files of weights that do not belong to the model: neither merged nor copied."""

    def __repr__(self) -> str:
        return f"Checkpoint({self.model}: {counted(len(self.weight_files), 'file')} of weights in {redact(self.url)})"


def is_repository(name: str) -> bool:
    """Tell whether a model of a config is one of the Hub's, and not a directory here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def resolve_models(stores: Stores, models: Iterable[ModelRef]) -> tuple[Checkpoint, ...]:
    """Return each model's checkpoint, in the order given.

    Raises:
        CheckpointError: as for `resolve_model`.
    """
    return tuple(resolve_model(stores, model) for model in models)


def resolve_model(stores: Stores, model: ModelRef) -> Checkpoint:
    """Find a model's files and read its config.json and its index.

    Raises:
        CheckpointError: there is no such directory, a file is missing, malformed or a link out of the directory, or the
            weights are of a kind that cannot be merged.
        FetchError: the store refuses or is down.
    """
    url = locate_model(stores, model)
    storage = stores.at(url)
    files = {name: file for name, file in storage.list(url).items() if not is_hidden(name)}
    names = list(files)
    for name in names:
        _check_name(name, url)
    if not names:
        raise nothing_there(storage, url)
    if CONFIG not in names:
        if any(name.startswith("adapter_model.") or name.endswith(".gguf") for name in names):
            raise _no_weights(url, names)
        cached = _CACHED.fullmatch(PurePosixPath(url).name)
        hint = f"; this is a folder of the Hub's cache: write {cached[1]}/{cached[2]}" if cached else ""
        raise CheckpointError(f"{url}: no {CONFIG}; a model is a directory with {CONFIG} and safetensors files{hint}")
    side_names = [name for name in names if _is_side_file(name)]
    directories = {parent.as_posix() for name in side_names for parent in PurePosixPath(name).parents}
    if both := directories.intersection(side_names):
        raise CheckpointError(
            f"{url}: {min(both)} is both a file and a directory, which no file system can hold; rename one"
        )
    if not is_url(url):
        _check_links(Path(url), [CONFIG, *side_names])
    config, config_text = _read_json(storage, f"{url}/{CONFIG}", _MAX_CONFIG_NBYTES)
    weight_map = None
    if INDEX in names:
        weight_map = _read_weight_map(storage, f"{url}/{INDEX}")
        weight_names = sorted(set(weight_map.values()))
        missing = sorted(set(weight_names).difference(names))
        if missing:
            raise CheckpointError(
                f"{url}: {listing(missing)} missing, of {counted(len(weight_names), 'file')} that {INDEX} names;"
                f" {_DOWNLOAD}"
            )
    elif SINGLE in names:
        weight_names = [SINGLE]
    else:
        raise _no_weights(url, names)
    return Checkpoint(
        model=model,
        url=url,
        config=config,
        config_text=config_text,
        weight_files=tuple(_check_not_empty(files[name]) for name in weight_names),
        weight_map=weight_map,
        side_files=tuple((name, files[name]) for name in side_names),
        other_weights=tuple(name for name in names if is_weights(name) and name not in weight_names),
    )


def locate_model(stores: Stores, model: ModelRef) -> str:
    """Return the directory of a model: its URL, the path of one that is there, or a repository on the Hub."""
    storage = stores.at(model.path)
    if scheme_of(model.path) != "file":
        return storage.pin(model.path, model.revision)
    path = Path(storage.absolute(model.path))
    if path.is_dir():
        if model.revision is not None:
            raise CheckpointError(
                f"{model}: {path} is a directory, and a directory has no revisions;"
                f" check out {model.revision!r} there and leave `@{model.revision}` out"
            )
        return str(path)
    if path.exists():
        raise CheckpointError(
            f"{model}: a file, not a directory; give the directory that holds {CONFIG} and the weights"
        )
    if HUB_NAME.fullmatch(model.path):
        return stores.at(f"hf://{model.path}").pin(f"hf://{model.path}", model.revision)
    is_path = model.path.startswith((".", "/", "~"))
    hint = "" if is_path else "; and no repository of the Hub: those are called owner/name, as Qwen/Qwen2.5-0.5B is"
    raise CheckpointError(f"{model}: no such directory ({path}){suggest_directory(path) or hint}")


def _read_json(storage: Storage, url: str, max_nbytes: int) -> tuple[dict[str, Any], str]:
    """Return a JSON object, and its text."""
    nbytes = storage.stat(url).nbytes
    if nbytes > max_nbytes:
        raise CheckpointError(f"{url}: {nbytes:,} bytes, at most {max_nbytes:,} are expected; {_DOWNLOAD}")
    try:
        text = storage.read(url, max_nbytes).decode()
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{url}: not JSON in UTF-8: {error}; {_DOWNLOAD}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{url}: a JSON {type(value).__name__}, an object is expected; {_DOWNLOAD}")
    return value, text


def _read_weight_map(storage: Storage, url: str) -> dict[str, str]:
    """Return which file holds each tensor, by an index file whose paths stay in its directory."""
    weight_map = _read_json(storage, url, _MAX_INDEX_NBYTES)[0].get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{url}: weight_map must be a mapping of tensor to file, and not empty; {_DOWNLOAD}")
    for tensor, name in weight_map.items():
        if not isinstance(name, str):
            raise CheckpointError(
                f"{url}: weight_map[{tensor!r}] is {name!r:.200}, not the name of a file; {_DOWNLOAD}"
            )
    for name in sorted(set(weight_map.values())):
        _check_name(name, url)
        if not name.endswith(".safetensors"):
            raise CheckpointError(f"{url}: weight_map names {name!r}, which is not a .safetensors file; {_DOWNLOAD}")
    return weight_map


def _check_name(name: str, url: str) -> None:
    """Refuse a name that leaves its directory, or that cannot be written as it is to every store."""
    parts = name.split("/")
    if not name or name.startswith("/") or not {"", ".", ".."}.isdisjoint(parts) or "\\" in name or ":" in parts[0]:
        raise CheckpointError(f"{url}: file name {name!r:.200} leaves the model's directory or is not plain; rename it")
    if not name.isprintable():
        raise CheckpointError(f"{url}: file name {name!a:.200} has control characters or is not UTF-8; rename it")


def _check_links(directory: Path, names: Iterable[str]) -> None:
    """Refuse links that lead out of a model: whatever they lead to would become part of the output.

    In the Hub's cache, snapshots/REVISION/NAME leads to blobs/HASH. Weights may be links to anywhere: nothing of them
    gets into the output but tensors.
    """
    root = directory.resolve()
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in names:
        path = directory / name
        if path.is_symlink() and not any(path.resolve().is_relative_to(parent) for parent in inside):
            raise CheckpointError(
                f"{path}: a link to {path.resolve()}, outside the model's directory, and it would be copied into the"
                " output; if you trust it, replace the link by the file, else delete it"
            )


def _check_not_empty(file: StoredFile) -> StoredFile:
    if file.nbytes == 0:
        raise CheckpointError(f"{file.url}: 0 bytes; {_DOWNLOAD}")
    return file


def _no_weights(url: str, names: list[str]) -> CheckpointError:
    """Return the error for weights in another form than `model.safetensors`, with the next step."""
    there = [name for name in names if is_weights(name)]
    if any(name.startswith("adapter_model.") for name in there):
        return CheckpointError(
            f"{url}: a LoRA adapter ({listing(there)}), not a whole model; merge it into its base first"
            " (peft: model.merge_and_unload()), and save the result"
        )
    if any(name.endswith(".gguf") for name in there):
        return CheckpointError(
            f"{url}: only GGUF ({listing(there)}), which is quantised;"
            f" merge the model that it was made from, or convert it: {_convert(', gguf_file=...')}"
        )
    safetensors = [name for name in there if name.endswith(".safetensors")]
    if safetensors:
        return CheckpointError(
            f"{url}: neither {SINGLE} nor {INDEX}, but {listing(safetensors)}; that is another layout than that of"
            " transformers. Download the model in transformers' layout, or convert it"
        )
    pickles = [name for name in there if name.endswith(_PICKLE_SUFFIXES)]
    if pickles:
        return CheckpointError(
            f"{url}: only pickled weights ({listing(pickles)}), which can run code when they are loaded;"
            f" if you trust them, convert them to safetensors: {_convert()}"
        )
    return CheckpointError(f"{url}: no weights: neither {SINGLE} nor {INDEX}; {_DOWNLOAD}")


def nothing_there(storage: Storage, url: str) -> CheckpointError:
    """Say that a directory has no files, or is one itself."""
    with suppress(FileNotFoundError, FetchError):
        storage.stat(url)
        return CheckpointError(
            f"{url}: a file, not a directory; give the directory that holds {CONFIG} and the weights"
        )
    revision = "" if scheme_of(url) == "hf" else url.rpartition("/")[2].partition("@")[2]
    hint = f", and leave `@{revision}` out: only a Hub repository has revisions" if revision else ""
    return CheckpointError(f"{url}: nothing is there; check the name{hint}, and that you may list it")


def _convert(arguments: str = "") -> str:
    return (
        'python -c "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;'
        f" M.from_pretrained('IN'{arguments}).save_pretrained('OUT', safe_serialization=True);"
        f" T.from_pretrained('IN'{arguments}).save_pretrained('OUT')\""
    )


def is_hidden(name: str) -> bool:
    """Tell whether a file is none of a model's: it, or a directory that it is in, is hidden."""
    return any(part.startswith(".") or part == "__pycache__" for part in PurePosixPath(name).parts)


def is_weights(name: str) -> bool:
    """Tell whether a file holds weights, in whatever format."""
    return name.endswith(_WEIGHT_SUFFIXES)


def _is_side_file(name: str) -> bool:
    is_index = name.endswith(".index.json") and is_weights(name.removesuffix(".index.json"))
    is_partial = name.endswith((".lock", ".incomplete"))
    is_left = is_index or is_partial or name in _REWRITTEN or _OF_TRAINING.match(name) is not None
    return not (is_weights(name) or is_left)
