"""The tensor table: one row for each tensor of each checkpoint, as a pyarrow table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import pyarrow as pa

from raymerge.pipeline.checkpoint.checkpoint import INDEX, Checkpoint
from raymerge.pipeline.checkpoint.header import TensorEntry, read_header
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

_CODED = pa.dictionary(pa.int32(), pa.string())

SCHEMA = pa.schema(
    [
        pa.field("model", _CODED, nullable=False),
        pa.field("name", pa.string(), nullable=False),
        pa.field("dtype", _CODED, nullable=False),
        pa.field("shape", pa.list_(pa.field("item", pa.int64(), nullable=False)), nullable=False),
        pa.field("file", _CODED, nullable=False),
        pa.field("start", pa.int64(), nullable=False),
        pa.field("stop", pa.int64(), nullable=False),
        pa.field("file_nbytes", pa.int64(), nullable=False),
        pa.field("etag", _CODED, nullable=False),
    ]
)
"""Columns of the table; `file` is a URL, and the tensor is the bytes [start, stop) of it."""

_NUM_READERS = 16
"""Far stores take a while to answer, whatever is asked for; this many answers can be waited for at once."""
_DAMAGED = "the checkpoint is damaged or mixed from two: download it again"


def read_table(stores: Stores, checkpoints: Iterable[Checkpoint]) -> pa.Table:
    """Read every header and return the tensors: checkpoints as given, files by name, tensors as they lie in the file.

    Raises:
        CheckpointError: a header is malformed, or a checkpoint's headers and its index file disagree.
        FetchError: a file could not be read.
    """
    files = [(checkpoint, file) for checkpoint in checkpoints for file in checkpoint.weight_files]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        headers = list(pool.map(lambda item: read_header(stores.at(item[1].url), item[1]), files))
    found: dict[str, tuple[Checkpoint, dict[str, StoredFile]]] = {}
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for (checkpoint, file), entries in zip(files, headers, strict=True):
        tensors = found.setdefault(str(checkpoint.model), (checkpoint, {}))[1]
        _add_tensors(tensors, file, entries)
        columns["model"] += [str(checkpoint.model)] * len(entries)
        columns["name"] += [entry.name for entry in entries]
        columns["dtype"] += [entry.dtype for entry in entries]
        columns["shape"] += [entry.shape for entry in entries]
        columns["file"] += [file.url] * len(entries)
        columns["start"] += [entry.start for entry in entries]
        columns["stop"] += [entry.stop for entry in entries]
        columns["file_nbytes"] += [file.nbytes] * len(entries)
        columns["etag"] += [file.etag] * len(entries)
    for checkpoint, tensors in found.values():
        _check_weight_map(checkpoint, tensors)
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def list_tensors(table: pa.Table) -> dict[str, dict[str, StoredTensor]]:
    """Return the rows by model, as `str` of its reference, and by tensor name, in the order of the table."""
    files: dict[tuple[str, int, str], StoredFile] = {}
    result: dict[str, dict[str, StoredTensor]] = {}
    for batch in table.to_batches():
        models, dtypes = _texts(batch["model"]), _texts(batch["dtype"])
        places = zip(
            _texts(batch["file"]), batch["file_nbytes"].to_numpy().tolist(), _texts(batch["etag"]), strict=True
        )
        rows = zip(
            models,
            batch["name"].to_pylist(),
            dtypes,
            _shapes(batch["shape"]),
            places,
            batch["start"].to_numpy().tolist(),
            batch["stop"].to_numpy().tolist(),
            strict=True,
        )
        for model, name, dtype, shape, place, start, stop in rows:
            file = files.get(place)
            if file is None:
                file = files[place] = StoredFile(*place)
            result.setdefault(model, {})[name] = StoredTensor(model, name, dtype, shape, file, start, stop)
    return result


def _add_tensors(tensors: dict[str, StoredFile], file: StoredFile, entries: Sequence[TensorEntry]) -> None:
    """Note which file holds each tensor."""
    for entry in entries:
        other = tensors.setdefault(entry.name, file)
        if other is not file:
            raise CheckpointError(f"tensor {entry.name!r} is in two files, {other.url} and {file.url}; {_DAMAGED}")


def _check_weight_map(checkpoint: Checkpoint, tensors: dict[str, StoredFile]) -> None:
    """Compare the index file with the headers, both ways."""
    if checkpoint.weight_map is None:
        return
    index = f"{checkpoint.url}/{INDEX}"
    for name, file in checkpoint.weight_map.items():
        found = tensors.get(name)
        if found is None or found.url != f"{checkpoint.url}/{file}":
            where = f"in {found.url}" if found else "in no file of the checkpoint"
            raise CheckpointError(f"tensor {name!r} is {where}, but {index} says {file}; {_DAMAGED}")
    if len(tensors) > len(checkpoint.weight_map):
        name = next(name for name in tensors if name not in checkpoint.weight_map)
        raise CheckpointError(f"tensor {name!r} is in {tensors[name].url}, but not in {index}; {_DAMAGED}")


def _texts(column: pa.Array) -> list[str]:
    """Return a dictionary-encoded column with each text held once."""
    if not isinstance(column, pa.DictionaryArray):
        texts: list[str] = column.to_pylist()
        return texts
    dictionary = column.dictionary.to_pylist()
    return [dictionary[code] for code in column.indices.to_numpy().tolist()]


def _shapes(column: pa.ListArray) -> list[tuple[int, ...]]:
    offsets, sizes = column.offsets.to_numpy().tolist(), column.values.to_numpy().tolist()
    return [tuple(sizes[start:stop]) for start, stop in pairwise(offsets)]
