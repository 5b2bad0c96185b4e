"""Models of points that are only planned: each is made when it is needed, and deleted after."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raymerge.pipeline.driver import merge
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.progress.events import OnEvent
from raymerge.pipeline.spectrum.record import Point, locate_point


@contextmanager
def materialised(
    directory: str,
    point: Point,
    options: MergeOptions | None = None,
    *,
    scratch: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Iterator[str]:
    """Have a point's model until the context ends: where it is, or merged to a directory of its own.

    Args:
        directory: the spectrum's.
        point: one of its points.
        options: how to merge.
        scratch: directory in which the model is made, and deleted at the end; that for temporary files by default.
        on_event: called with each event of the merge, in the caller's thread.

    Raises:
        RaymergeError: the point cannot be made; it says why.
    """
    if point.state == "failed":
        raise OutputError(f"{point.name} cannot be made: {point.error}")
    if point.state == "complete":
        yield locate_point(directory, point)
        return
    options = replace(options or MergeOptions(), seed=point.seed, keep_intermediates=None)
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    place = Path(tempfile.mkdtemp(prefix=f"raymerge-{point.name}-", dir=scratch))
    try:
        merge(point.config, place / point.name, options, on_event=on_event)
        yield str(place / point.name)
    finally:
        shutil.rmtree(place, ignore_errors=True)
