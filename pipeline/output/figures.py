"""raymerge_figures.parquet: what is known of each tensor of a merged model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.parquet as pq

from raymerge.pipeline.checkpoint.columns import make_numbers, make_texts
from raymerge.pipeline.plan.results import ShardFile
from raymerge.pipeline.plan.types import MergePlan


def make_figures(plan: MergePlan, files: Sequence[ShardFile]) -> pa.Table:
    """Return one row for each tensor: its name and file, its norm, and what its kernel has measured.

    Args:
        plan: what was done.
        files: the shards of one output.
    """
    by_file = {file.file: file.figures for file in files}
    names: list[str] = []
    places: list[str] = []
    found: list[Mapping[str, float]] = []
    for task in plan.tasks:
        own = by_file[task.file]
        names += [merge.name for merge in task.merges]
        places += [task.file] * len(task.merges)
        found += [own.get(merge.name, {}) for merge in task.merges]
    measured = sorted({key for figures in found for key in figures} - {"norm"})
    columns = {key: make_numbers([figures.get(key) for figures in found], pa.float32()) for key in ("norm", *measured)}
    return pa.table({"name": make_texts(names), "file": make_texts(places), **columns})


def summarise(figures: pa.Table) -> Mapping[str, Mapping[str, float]]:
    """Return the smallest, mean and largest finite value of each column of figures, to five digits."""
    summary = {}
    for name in figures.column_names[2:]:
        values = [value for value in figures[name].to_pylist() if value is not None and math.isfinite(value)]
        if values:
            least, mean, most = min(values), math.fsum(values) / len(values), max(values)
            summary[name] = {"min": _shorten(least), "mean": _shorten(mean), "max": _shorten(most)}
    return summary


def dump_figures(figures: pa.Table) -> bytes:
    """Return the content of the Parquet file."""
    sink = pa.BufferOutputStream()
    pq.write_table(figures, sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def _shorten(value: float) -> float:
    return float(f"{value:.5g}")
