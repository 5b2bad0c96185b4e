"""Inspects a checkpoint, from its listing and its headers alone."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence, Set
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from raymerge.pipeline.checkpoint.adapters.adapter import open_adapter
from raymerge.pipeline.checkpoint.adapters.modules import describe_adapter
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, locate_model, resolve_model
from raymerge.pipeline.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    PIPELINE,
    SINGLE,
    index_of,
    is_hidden,
    is_weights,
)
from raymerge.pipeline.checkpoint.header import FIRST_READ_NBYTES
from raymerge.pipeline.checkpoint.inspection.results import FoundFile, Inspection, Role, summarise
from raymerge.pipeline.checkpoint.manifest import MANIFEST, Origin, parse_origin
from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.side_files import find_side_files
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.views.quantised import find_quantisation
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.seam import Storage
from raymerge.pipeline.stores.settings import Library, StoreSettings
from raymerge.pipeline.urls import check_url, is_url, scheme_of

_MAX_JSON_NBYTES = 512 * 2**20
_HUB_FILE = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*(@[^/]+)?/[^/]+\.safetensors")


def inspect(url: str | Path, *, storage: Library = "auto") -> Inspection:
    """Return the contents of a checkpoint, reading headers and small files only.

    What cannot be merged is looked at as far as possible, and `obstacle` says why it cannot.

    Args:
        url: a directory, its URL, a Hub repository (`org/name`, `org/name@revision`, `hf://...`), or a single
            .safetensors file in any of them.
        storage: what serves object stores and the web: the fastest library for each, or `fsspec` for all.

    Raises:
        ConfigError: the URL is malformed.
        CheckpointError: nothing is there, or a header is damaged.
        FetchError: the store refuses or is down.
    """
    with open_stores(StoreSettings(storage)) as stores:
        look = _inspect_file if _is_file(stores, str(url)) else _inspect_model
        return look(stores, str(url))


class _Reads:
    """Counts what is read."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.num = 0

    def note(self, *sizes: int) -> None:
        self.nbytes += sum(sizes)
        self.num += len(sizes)

    def note_header(self, file: StoredFile, header_nbytes: int) -> None:
        first = min(file.nbytes, FIRST_READ_NBYTES)
        self.note(first, *([header_nbytes - first] if header_nbytes > first else []))


def _is_file(stores: Stores, url: str) -> bool:
    check_url(url)
    path = urlsplit(url).path if scheme_of(url) in ("http", "https") else url  # a signed URL goes on after its path
    return path.endswith(".safetensors") and not (scheme_of(url) == "file" and _local_path(stores, url).is_dir())


def _local_path(stores: Stores, url: str) -> Path:
    return Path(stores.at(url).absolute(url))


def _parse(stores: Stores, url: str) -> ModelRef:
    """Return the model that a URL names: as in a config, but that any path which is there is one."""
    check_url(url)
    is_whole = scheme_of(url) != "hf" or "%2F" in url  # with %2F in a revision, the storage alone can tell its end
    if is_whole and (is_url(url) or _local_path(stores, url).exists()):
        return ModelRef(url)
    path, at, revision = url.partition("@")
    if not path.strip() or (at and not revision.strip()) or "@" in revision:
        raise ConfigError(f"{url!r} is not a directory, and no `org/name@revision` either; check the name")
    return ModelRef(path, revision if at else None)


def _inspect_file(stores: Stores, url: str) -> Inspection:
    """Look at one .safetensors file, and at nothing beside it."""
    is_bare = not is_url(url) and not _local_path(stores, url).exists()
    if scheme_of(url) == "hf" or (is_bare and _HUB_FILE.fullmatch(url)):
        directory, _, name = url.rpartition("/")
        url = f"{locate_model(stores, _parse(stores, directory))}/{name}"
    elif scheme_of(url) == "file":
        url = str(_local_path(stores, url))
    storage = stores.at(url)
    try:
        file = storage.stat(url)
    except FileNotFoundError:
        raise CheckpointError(f"{url}: no such file; check the name") from None
    reads = _Reads()
    name = (urlsplit(url).path if scheme_of(url) in ("http", "https") else url).rpartition("/")[2]
    tensors = _read_tensors(stores, {name: file}, reads)
    return summarise(url, {}, "", [FoundFile(name, file.nbytes, "weights")], tensors, None, reads.nbytes, reads.num)


def _inspect_model(stores: Stores, url: str) -> Inspection:
    url = locate_model(stores, _parse(stores, url))
    storage = stores.at(url)
    files = {name: file for name, file in storage.list(url).items() if not is_hidden(name)}
    if not files:
        raise CheckpointError(f"{url}: nothing is there; check the name, and that you may list it")
    reads = _Reads()
    obstacle = ""
    networks: Sequence[Checkpoint] = ()
    resolving: tuple[str, ...] = (CONFIG, INDEX)
    try:
        checkpoint = resolve_model(stores, ModelRef(url))  # where it is pinned to, so that both listings are the same
    except CheckpointError as error:
        obstacle = _describe_adapter(stores, url, files) or str(error)
        config = _read_object(storage, files, CONFIG, reads)
        names = _guess_weights(storage, files, reads)
        side_names: set[str] = set()
    else:
        config, networks = checkpoint.config, checkpoint.networks or [checkpoint]
        resolving = tuple(part.prefix + name for part in networks for name in (CONFIG, index_of(part.stem)))
        if checkpoint.components:
            resolving = (PIPELINE, *resolving)
        names = [file.url.removeprefix(f"{checkpoint.url}/") for file in checkpoint.weight_files]
        beside = find_side_files(stores, checkpoint)
        side_names = {name for name, _ in (*beside.copied, *beside.masked)}
        reads.note(*beside.read_nbytes)
    reads.note(*(files[name].nbytes for name in resolving if name in files))
    tensors = _read_tensors(stores, {name: files[name] for name in names}, reads)
    of_networks = [
        (part, [tensor for tensor in tensors if tensor.file.url.startswith(part.prefix)]) for part in networks
    ]
    for part, own in of_networks:
        obstacle = obstacle or _find_obstacle(part, own, side_names)
    if networks:
        tensors = [replace(tensor, name=part.prefix + tensor.name) for part, own in of_networks for tensor in own]
    made = _read_origin(storage, files, reads)
    found = [FoundFile(name, file.nbytes, _role(name, names, side_names)) for name, file in files.items()]
    return summarise(url, config, obstacle, found, tensors, made, reads.nbytes, reads.num)


def _find_obstacle(network: Checkpoint, tensors: Sequence[StoredTensor], side_names: Set[str]) -> str:
    """Return why a model or component cannot be merged, by its index and its tensors."""
    from raymerge.pipeline.checkpoint.table import DAMAGED, find_index_faults  # pyarrow: slow to import

    directory = network.prefix[:-1]
    if network.weight_map is not None:
        fault = next(find_index_faults(directory, network.weight_map, tensors, network.index), None)
        if fault:
            return f"{directory}: {fault}; {DAMAGED}" if directory else f"{fault}; {DAMAGED}"
    return find_quantisation(network.config, side_names, {tensor.name: tensor for tensor in tensors}).explain() or ""


def _describe_adapter(stores: Stores, url: str, files: Mapping[str, StoredFile]) -> str:
    """Return what an adapter is for; empty where there is none, or it is damaged."""
    if ADAPTER_CONFIG not in files:
        return ""
    with suppress(CheckpointError):
        what = describe_adapter(open_adapter(stores, ModelRef(url)))
        return f"{what}; merge it with other adapters, or name it after its base, as MODEL+ADAPTER"
    return ""


def _read_object(storage: Storage, files: Mapping[str, StoredFile], name: str, reads: _Reads) -> Json:
    """Return a JSON object; an empty one where there is none, or a damaged one."""
    file = files.get(name)
    if file is None or file.nbytes > _MAX_JSON_NBYTES:
        return {}
    with suppress(ValueError):
        content = storage.read(file.url, _MAX_JSON_NBYTES)
        reads.note(len(content))
        value = parse_json(content)
        if isinstance(value, dict):
            return value
    return {}


def _guess_weights(storage: Storage, files: Mapping[str, StoredFile], reads: _Reads) -> list[str]:
    """Return the safetensors files of something that cannot be merged: those of the model, or all."""
    weight_map = _read_object(storage, files, INDEX, reads).get("weight_map")
    listed = weight_map.values() if isinstance(weight_map, dict) else ()
    named = {name for name in listed if isinstance(name, str) and name in files} or {SINGLE}.intersection(files)
    return sorted(named or (name for name in files if name.endswith(".safetensors")))


def _read_tensors(stores: Stores, files: Mapping[str, StoredFile], reads: _Reads) -> list[StoredTensor]:
    """Return the tensors of some files, each file called by its name here."""
    from raymerge.pipeline.checkpoint.table import list_tensors, read_table  # pyarrow: slow to import

    names = {file.url: name for name, file in files.items()}
    tensors = [t for listed in list_tensors(read_table(stores, {"": files.values()})).values() for t in listed]
    starts = {tensor.file.url: tensor.start for tensor in reversed(tensors)}
    for file in files.values():
        reads.note_header(file, starts.get(file.url, file.nbytes))
    tensors = [replace(tensor, file=StoredFile(names[tensor.file.url], tensor.file.nbytes, "")) for tensor in tensors]
    return sorted(tensors, key=lambda tensor: (natural_key(tensor.name), tensor.file.url))


def _read_origin(storage: Storage, files: Mapping[str, StoredFile], reads: _Reads) -> Origin | None:
    return parse_origin(_read_object(storage, files, MANIFEST, reads)) if MANIFEST in files else None


def _role(name: str, weights: Sequence[str], side_names: set[str]) -> Role:
    if name in weights:
        return "weights"
    if is_weights(name):
        return "other weights"
    if name in (CONFIG, INDEX):
        return "config"
    return "side file" if name in side_names else "other"
