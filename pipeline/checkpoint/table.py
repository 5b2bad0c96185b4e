"""The tensor table: one row for each tensor of each checkpoint, as a pyarrow table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pyarrow as pa

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.columns import (
    make_coded,
    make_lists,
    make_numbers,
    make_texts,
    read_numbers,
    read_texts,
)
from raymerge.pipeline.checkpoint.files import INDEX
from raymerge.pipeline.checkpoint.header import read_header
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.weights import GO_ON
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import listing
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
DAMAGED = (
    "the checkpoint is damaged or mixed from two: download it again;"
    f" if it is published so, {GO_ON} lets the headers decide, as loaders do"
)


def read_table(
    stores: Stores,
    models: Mapping[str, Iterable[StoredFile]],
    check: Callable[[StoredFile, int], None] = lambda file, num_tensors: None,
) -> pa.Table:
    """Read the header of every file and return the tensors: models as given, files by name, tensors as they lie there.

    Args:
        stores: that have the files.
        models: the files of each model, by its reference as text.
        check: called with each file and the number of tensors that its header seems to have, before it is parsed.

    Raises:
        CheckpointError: a header is malformed.
        FetchError: a file could not be read.
    """
    files = [(model, file) for model, listed in models.items() for file in listed]
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        headers = pool.map(lambda item: read_header(stores.at(item[1].url), item[1], check), files)
    columns: dict[str, list[Any]] = {name: [] for name in SCHEMA.names}
    for (model, file), entries in zip(files, headers, strict=True):
        columns["model"] += [model] * len(entries)
        columns["name"] += [entry.name for entry in entries]
        columns["dtype"] += [entry.dtype for entry in entries]
        columns["shape"] += [entry.shape for entry in entries]
        columns["file"] += [file.url] * len(entries)
        columns["start"] += [entry.start for entry in entries]
        columns["stop"] += [entry.stop for entry in entries]
        columns["file_nbytes"] += [file.nbytes] * len(entries)
        columns["etag"] += [file.etag] * len(entries)
    return pa.Table.from_arrays([_make_column(columns[column.name], column.type) for column in SCHEMA], schema=SCHEMA)


def list_tensors(table: pa.Table) -> dict[str, list[StoredTensor]]:
    """Return the tensors of each model, by its reference as text, in the order of the table."""
    files: dict[tuple[str, int, str], StoredFile] = {}
    result: dict[str, list[StoredTensor]] = {}
    for batch in table.to_batches():
        models, dtypes = read_texts(batch["model"]), read_texts(batch["dtype"])
        sizes = read_numbers(batch["file_nbytes"]).tolist()
        places = zip(read_texts(batch["file"]), sizes, read_texts(batch["etag"]), strict=True)
        rows = zip(
            models,
            batch["name"].to_pylist(),
            dtypes,
            _shapes(batch["shape"]),
            places,
            read_numbers(batch["start"]).tolist(),
            read_numbers(batch["stop"]).tolist(),
            strict=True,
        )
        for model, name, dtype, shape, place, start, stop in rows:
            file = files.get(place)
            if file is None:
                file = files[place] = StoredFile(*place)
            result.setdefault(model, []).append(StoredTensor(model, name, dtype, shape, file, start, stop))
    return result


def release_tables() -> None:
    """Give back the memory of tables that are no longer used: Arrow keeps it, 12 MiB after those of 20 models."""
    pa.default_memory_pool().release_unused()


def index_tensors(
    checkpoint: Checkpoint, tensors: Iterable[StoredTensor]
) -> tuple[dict[str, StoredTensor], tuple[str, ...]]:
    """Return a checkpoint's tensors by name, and a warning if its headers decide against its index.

    Of two tensors of one name, the one in the later file is the model's, as loaders have it. Names of a component of a
    pipeline begin with its prefix.

    Raises:
        CheckpointError: its headers and its index file disagree, and the headers are not to decide.
    """
    model = str(checkpoint.model)
    tensors = [tensor if tensor.model == model else replace(tensor, model=model) for tensor in tensors]
    by_name = {tensor.name: tensor for tensor in tensors}
    if prefix := checkpoint.prefix:
        by_name = {prefix + name: replace(tensor, name=prefix + name) for name, tensor in by_name.items()}
    faults = list(find_index_faults(checkpoint.url, checkpoint.weight_map, tensors, checkpoint.index))
    if not faults:
        return by_name, ()
    if not checkpoint.trusts_headers:
        where = f"{checkpoint.url}/{checkpoint.index}".removesuffix("/")
        raise CheckpointError(f"{where}: {faults[0]}; {DAMAGED}")
    what = f"{checkpoint.index} and the headers disagree" if checkpoint.index else "the files disagree"
    return by_name, (f"{checkpoint.model}: {what}; the headers decide, as in loaders: {listing(faults)}",)


def find_index_faults(
    url: str, weight_map: Mapping[str, str] | None, tensors: Iterable[StoredTensor], index: str = INDEX
) -> Iterator[str]:
    """Yield the contradictions between the headers of a model and its index.

    Args:
        url: of the model's directory.
        weight_map: tensor to file, as the index has it; None where there is no index.
        tensors: as the headers have them.
        index: the name of the index.
    """
    found: dict[str, str] = {}
    for tensor in tensors:
        name = tensor.file.url.removeprefix(f"{url}/")
        other = found.setdefault(tensor.name, name)
        if other != name:
            yield f"tensor {tensor.name!r} is in two files, {other} and {name}"
    if weight_map is None:
        return
    for name in sorted(weight_map.keys() | found.keys()):
        if weight_map.get(name) != found.get(name):
            stated, stored = weight_map.get(name, "no file"), found.get(name, "no file")
            yield f"tensor {name!r} is in {stored}, but {index} says {stated}"


def _make_column(values: list[Any], kind: pa.DataType) -> pa.Array:
    if pa.types.is_integer(kind):
        return make_numbers(values, kind)
    if pa.types.is_list(kind):
        return make_lists(values, kind)
    return make_coded(values) if pa.types.is_dictionary(kind) else make_texts(values)


def _shapes(column: pa.ListArray) -> list[tuple[int, ...]]:
    offsets, sizes = read_numbers(column.offsets).tolist(), read_numbers(column.values).tolist()
    return [tuple(sizes[start:stop]) for start, stop in pairwise(offsets)]
