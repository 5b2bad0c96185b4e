"""Reads a task's inputs, window by window."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass
from itertools import chain, pairwise

from raymerge.pipeline.buffers import POOL
from raymerge.pipeline.memory import aligned
from raymerge.pipeline.storage import ByteRange, Storage
from raymerge.pipeline.windows import Fetch, Window


@dataclass(frozen=True, slots=True)
class Filled:
    """A window whose bytes have arrived."""

    window: Window
    views: tuple[memoryview, ...]
    """Each source's bytes of the window, in order; valid until the next window is asked for."""


def fetch_windows(storage: Storage, fetches: Iterable[Fetch], buffer_nbytes: int) -> Generator[Filled, None, None]:
    """Yield a task's windows, filled; while one is merged, the storage already knows what is read next.

    Reading and merging are done by the same thread, so that bytes are still in its core's cache when they are merged.

    Raises:
        FetchError: a range could not be read, or its file has changed.
    """
    buffer = POOL.acquire(max(1, buffer_nbytes))
    try:
        for fetch, following in pairwise(chain(fetches, [()])):
            windows = _lay_out(fetch, memoryview(buffer))
            storage.read_into(_ranges(fetch), [view for filled in windows for view in filled.views])
            storage.will_read(_ranges(following))
            yield from windows
    finally:
        POOL.release(buffer)


def _ranges(fetch: Fetch) -> list[ByteRange]:
    return [piece for window in fetch for piece in window.ranges()]


def _lay_out(fetch: Fetch, buffer: memoryview) -> list[Filled]:
    """Give each source of each window its place in a buffer."""
    windows = []
    offset = 0
    for window in fetch:
        views = []
        for piece in window.ranges():
            views.append(buffer[offset : offset + piece.nbytes])
            offset += aligned(piece.nbytes)
        windows.append(Filled(window, tuple(views)))
    return windows
