"""Models of points that are only planned: each is made when it is needed, and deleted after."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from raymerge import __version__
from raymerge.cluster.directory import make_directory
from raymerge.ops.own import read_own_ops
from raymerge.pipeline.driver import merge_variants
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.progress.events import Event, OnEvent, Planned
from raymerge.pipeline.spectrum.places import load_point
from raymerge.pipeline.spectrum.record import Point, Spectrum, locate_point
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import StoreSettings


@contextmanager
def materialised(
    directory: str,
    spectrum: Spectrum,
    point: Point,
    options: MergeOptions | None = None,
    *,
    scratch: str | Path | None = None,
    on_event: OnEvent | None = None,
) -> Iterator[str]:
    """Have a point's model until the context ends: where it is, or merged to a directory of its own.

    Args:
        directory: the spectrum's.
        spectrum: its record, or one of the point alone.
        point: one of its points.
        options: how to merge; seed, shard size and whether to trust headers are those of the sweep.
        scratch: directory in which the model is made, and deleted at the end, or by a later run if this one is killed;
            that for temporary files by default.
        on_event: called with each event of the merge, in the caller's thread.

    Raises:
        RaymergeError: the point cannot be made, or would not be what was planned; it says why.
    """
    if point.state == "failed":
        raise OutputError(f"{point.name} cannot be made: {point.error}")
    if point.state == "complete":
        yield locate_point(directory, point)
        return
    options = replace(
        options or MergeOptions(),
        seed=point.seed,
        shard_size=point.shard_size,
        trust_headers=point.trust_headers,
        keep_intermediates=None,
    )

    def watch(event: Event) -> None:
        if isinstance(event, Planned) and point.fingerprint not in ("", event.fingerprint):
            _check_version(spectrum, point)
        if on_event is not None:
            on_event(event)

    own = read_own_ops(options.ops) if options.ops else None
    if point.ops and (own is None or own.identity != point.ops):
        given = f"{options.ops} is another" if own else "none is given"
        raise ConfigError(
            f"{point.name} was planned with a file of merge methods (SHA-256 {point.ops[:12]}...), and {given}; give"
            " that file as --ops"
        )
    with open_stores(StoreSettings(options.storage)) as stores:
        config = load_point(stores, spectrum, directory, point.config, own)
    root = Path(scratch or tempfile.gettempdir())
    root.mkdir(parents=True, exist_ok=True)
    with make_directory(root) as place:
        merge_variants([config], [place / point.name], options, on_event=watch)
        yield str(place / point.name)


def _check_version(spectrum: Spectrum, point: Point) -> None:
    """Refuse a plan that has come out otherwise than in the sweep, but for another version's."""
    if spectrum.raymerge == __version__:
        raise OutputError(
            f"{point.name} comes out otherwise than planned: its inputs have changed since, or it was planned with"
            " options that the record does not have; sweep it again with --overwrite"
        )
