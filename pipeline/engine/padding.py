"""Rows of padding, which are the mean of all rows before them: read once more, before a shard is merged."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from raymerge.ops.decoder import Raw
from raymerge.ops.lazy import np, torch
from raymerge.pipeline.checkpoint.gathered_rows import GatheredRows
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.stores.open import Stores

_CHUNK_ELEMENTS = 2**16
"""Elements decoded at once; the plan counts their memory."""


def fill_padding(stores: Stores, task: ShardTask, on_read: Callable[[int], None]) -> ShardTask:
    """Return the task with the padding of its sources filled in.

    Args:
        stores: that have the inputs.
        task: what is to be made.
        on_read: called with the number of bytes of each read.

    Raises:
        FetchError: a range could not be read, or its file has changed.
    """
    if not any(_needs_padding(source) for merge in task.merges for source in merge.sources):
        return task
    return replace(task, merges=tuple(_fill(stores, merge, on_read) for merge in task.merges))


def _fill(stores: Stores, merge: TensorMerge, on_read: Callable[[int], None]) -> TensorMerge:
    sources: Sequence[Source] = [
        replace(source, padding=_average(stores, source, on_read))
        if isinstance(source, GatheredRows) and _needs_padding(source)
        else source
        for source in merge.sources
    ]
    return replace(merge, sources=tuple(sources))


def _needs_padding(source: Source) -> bool:
    return isinstance(source, GatheredRows) and source.rows.num_pad > 0 and not source.padding


def _average(stores: Stores, source: GatheredRows, on_read: Callable[[int], None]) -> bytes:
    """Return the mean of the rows before the padding, as float32, added up in float64 row by row."""
    columns, decoder = source.columns, source.decoder
    num_rows = source.rows.num_rows - source.rows.num_pad
    total = np.zeros(columns, np.float64)
    step = max(1, _CHUNK_ELEMENTS // columns)
    for row in range(0, num_rows, step):
        start, stop = row * columns, min(num_rows, row + step) * columns
        pieces = stores.read_ranges(list(source.ranges(start, stop)))
        on_read(sum(map(len, pieces)))
        raw = Raw([torch.frombuffer(bytearray(piece), dtype=torch.uint8) for piece in pieces], start, stop)
        values = decoder.decode(raw, start, stop, torch.empty(stop - start))
        total += values.numpy().reshape(-1, columns).sum(axis=0, dtype=np.float64)
    return (total / max(1, num_rows)).astype(np.float32).tobytes()
