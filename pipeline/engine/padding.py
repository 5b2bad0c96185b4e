"""Rows of padding, which are the mean of all rows before them: read once more, before a shard is merged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.values import stream_values
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.plan.sources.merged import MergedRows, MergedTensor
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.stores.open import Stores


def fill_padding(stores: Stores, task: ShardTask, on_read: Callable[[int], None]) -> ShardTask:
    """Return the task with the padding of its sources filled in.

    Args:
        stores: that have the inputs.
        task: what is to be made.
        on_read: called with the number of bytes of each read.

    Raises:
        FetchError: a range could not be read, or its file has changed.
    """
    fill = partial(_fill, stores, on_read)
    merges = tuple(_fill_merge(merge, fill) for merge in task.merges)
    return task if merges == task.merges else replace(task, merges=merges)


def _fill_merge(merge: TensorMerge, fill: Callable[[Source], Source]) -> TensorMerge:
    """Return the merge itself where there is nothing to fill in."""
    sources = tuple(fill(source) for source in merge.sources)
    is_same = all(new is old for new, old in zip(sources, merge.sources, strict=True))
    return merge if is_same else replace(merge, sources=sources)


def _fill(stores: Stores, on_read: Callable[[int], None], source: Source) -> Source:
    """Return a source with its padding, after that of what it is made of; itself where there is none."""
    fill = partial(_fill, stores, on_read)
    if isinstance(source, MergedTensor):
        merge = _fill_merge(source.merge, fill)
        return source if merge is source.merge else replace(source, merge=merge)
    if isinstance(source, MergedRows):
        source = replace(source, parts=tuple(fill(part) for part in source.parts))
    if isinstance(source, GatheredRows | MergedRows) and source.rows.num_pad and not source.padding:
        return replace(source, padding=_average(stores, source, on_read))
    return source


def _average(stores: Stores, source: GatheredRows | MergedRows, on_read: Callable[[int], None]) -> bytes:
    """Return the mean of the rows before the padding, as float32, added up in float64 row by row."""
    columns = source.columns
    num_rows = source.rows.num_rows - source.rows.num_pad
    total = np.zeros(columns, np.float64)
    for _, values in stream_values(stores, source, unit=columns, stop=num_rows * columns, on_read=on_read):
        total += values.numpy().reshape(-1, columns).sum(axis=0, dtype=np.float64)
    return (total / max(1, num_rows)).astype(np.float32).tobytes()
