"""Checks a finished model against its manifest, its index and its own headers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from pathlib import Path, PurePosixPath

import safetensors

from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Progress, Report, Resources
from raymerge.pipeline.checkpoint.files import PIPELINE
from raymerge.pipeline.checkpoint.header import TensorEntry
from raymerge.pipeline.checkpoint.manifest import MANIFEST, Contents, OutputFile
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.weights import read_weight_map
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.output.journal import read_begun
from raymerge.pipeline.output.state import find_unlisted, locate_output, read_manifest
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import COPY_NBYTES, Stores, open_stores
from raymerge.pipeline.stores.settings import Library, StoreSettings
from raymerge.pipeline.urls import scheme_of

_INDEX = ".safetensors.index.json"


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """Totals of a sound model."""

    num_files: int
    num_tensors: int
    nbytes: int


def verify(
    out: str | Path,
    *,
    workers: int = 2,
    storage: Library = "auto",
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> VerifyReport:
    """Read a whole model and compare it with what was written.

    Args:
        out: the model's directory, as a path or URL.
        workers: files read at once.
        storage: what serves object stores and the web: the fastest library for each, or `fsspec` for all.
        on_progress: told of the bytes read.

    Raises:
        ConfigError: `workers` is below 1.
        OutputError: the model is unfinished, or was not made by raymerge, or a file is missing, extra, or has changed;
            the message lists every case.
    """
    if workers < 1:
        raise ConfigError(f"workers is {workers}; it must be 1 or more")
    with open_stores(StoreSettings(storage)) as stores:
        return check_model(stores, locate_output(stores, out), workers, on_progress)


def check_model(
    stores: Stores, out: str, workers: int, on_progress: Callable[[Progress], None] = lambda progress: None
) -> VerifyReport:
    """Do what `verify` does, with the stores of another call."""
    manifest = _read_manifest(stores, out)
    files = manifest.files
    problems = [f"{name}: a file that the manifest does not list" for name in find_unlisted(stores, out, manifest)]
    checks = LocalRunner(workers).run(
        partial(_check_file, stores, out=out),
        list(files.items()),
        [Resources(mem_nbytes=COPY_NBYTES, cost=file.nbytes) for file in files.values()],
        on_progress,
    )
    problems += sorted(problem for problem in checks if problem)
    num_tensors = 0
    if not problems:
        for directory, shards in _group_shards(files).items():
            tensors = _read_tensors(stores, out, shards)
            num_tensors += len(tensors)
            indexes = [name for name in files if name.rpartition("/")[0] == directory and name.endswith(_INDEX)]
            problems += _compare_tensors(stores, f"{out}/{directory}".rstrip("/"), tensors, indexes)
    if problems:
        raise OutputError(f"{out} is not what was written:\n  " + "\n  ".join(problems))
    return VerifyReport(len(files), num_tensors, sum(file.nbytes for file in files.values()))


def _group_shards(files: Iterable[str]) -> dict[str, list[str]]:
    """Return the files of tensors by their directory: those of a pipeline's components, or of the model.

    Files of a model's modules in directories of their own are copied, and not looked into.
    """
    shards = [name for name in files if name.endswith(".safetensors")]
    groups: dict[str, list[str]] = {}
    for name in shards if PIPELINE in files else [name for name in shards if "/" not in name]:
        groups.setdefault(name.rpartition("/")[0], []).append(name)
    return groups


def check_shard(
    stores: Stores, item: tuple[int, ShardFile], report: Report, *, outs: Sequence[str], recheck: bool
) -> tuple[int, ShardFile] | None:
    """Return a recorded shard if its file is as it was; read only where its etag has changed, or that is asked for.

    Args:
        stores: of the outputs.
        item: which of the outputs, and the shard there.
        report: told of the bytes read.
        outs: the output directories.
        recheck: whether to read it all the same: on disks the etag is made of size and time, elsewhere of the content.
    """
    output, recorded = item
    try:
        file = stores.at(outs[output]).stat(f"{outs[output]}/{recorded.file}")
    except FileNotFoundError:  # deleted just now
        return None
    if (recheck or file.etag != recorded.etag) and hash_file(stores, file, report) != recorded.sha256:
        return None
    return output, replace(recorded, etag=file.etag)


def _check_file(stores: Stores, item: tuple[str, OutputFile], report: Report, *, out: str) -> str:
    """Return the fault of one file, or nothing."""
    name, expected = item
    try:
        file = stores.at(out).stat(f"{out}/{name}")
    except FileNotFoundError:
        return f"{name}: missing"
    if file.nbytes != expected.nbytes:
        return f"{name}: {file.nbytes:,} bytes, {expected.nbytes:,} were written"
    found = hash_file(stores, file, report)
    return "" if found == expected.sha256 else f"{name}: sha256 is {found}, {expected.sha256} was written"


def hash_file(stores: Stores, file: StoredFile, report: Report) -> str:
    """Return the sha256 of a file, in hex."""
    digest = hashlib.sha256()
    for piece in stores.read_pieces(file):
        digest.update(piece)
        report(Progress(read_nbytes=piece.nbytes))
    return digest.hexdigest()


def _read_manifest(stores: Stores, out: str) -> Contents:
    try:
        manifest = read_manifest(stores, out)
    except FileNotFoundError:
        if read_begun(stores, out) is not None:
            raise OutputError(f"{out} is unfinished; run the same `raymerge merge` again to finish it") from None
        raise OutputError(f"{out} has no {MANIFEST}: it was not made by raymerge, or is not a model") from None
    except ValueError as error:
        raise OutputError(f"{out}/{MANIFEST} is damaged: {error}") from error
    for name in manifest.files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts:
            raise OutputError(f"{out}/{MANIFEST} names a file outside the directory: {name}")
    return manifest


def _read_tensors(stores: Stores, out: str, shards: Sequence[str]) -> list[StoredTensor]:
    from raymerge.pipeline.checkpoint.table import list_tensors, read_table  # pyarrow: slow to import

    files = [stores.at(out).stat(f"{out}/{name}") for name in shards]
    return list_tensors(read_table(stores, {out: files})).get(out, [])


def _compare_tensors(
    stores: Stores, directory: str, tensors: Sequence[StoredTensor], indexes: Sequence[str]
) -> Iterator[str]:
    """Yield the differences of the index or, where files are local, the safetensors library from the headers.

    Args:
        stores: of the output.
        directory: of the files.
        tensors: as the headers have them.
        indexes: the name of the index, if there is one.
    """
    from raymerge.pipeline.checkpoint.table import find_index_faults

    if scheme_of(directory) == "file":
        for url, entries in groupby(tensors, lambda tensor: tensor.file.url):
            yield from (f"{Path(url).name}: {problem}" for problem in find_disagreements(Path(url), entries))
    weight_map = None
    for name in indexes:
        weight_map = read_weight_map(stores.at(directory), f"{directory}/{name.rpartition('/')[2]}")
    yield from find_index_faults(directory, weight_map, tensors)


def find_disagreements(path: Path, entries: Iterable[TensorEntry | StoredTensor]) -> Iterator[str]:
    """Yield the differences between the safetensors library's reading of a file's header and ours."""
    try:
        with safetensors.safe_open(path, framework="numpy") as file:
            slices = ((name, file.get_slice(name)) for name in file.offset_keys())
            theirs = {name: (part.get_dtype(), tuple(part.get_shape())) for name, part in slices}
    except safetensors.SafetensorError as error:
        yield f"the safetensors library does not open it: {error}"
        return
    ours = {entry.name: (entry.dtype, entry.shape) for entry in entries}
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            yield f"{name}: we read {_show(ours.get(name))}, the safetensors library {_show(theirs.get(name))}"


def _show(tensor: tuple[str, tuple[int, ...]] | None) -> str:
    return f"{tensor[0]} {list(tensor[1])}" if tensor else "nothing"
