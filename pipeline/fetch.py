"""Reads a task's inputs ahead of the merging."""

from __future__ import annotations

import mmap
import queue
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

from raymerge.pipeline.buffers import POOL
from raymerge.pipeline.memory import NUM_BUFFERS, aligned
from raymerge.pipeline.storage import Storage
from raymerge.pipeline.windows import Fetch, Window


@dataclass(frozen=True, slots=True)
class Filled:
    """A window whose bytes have arrived."""

    window: Window
    views: tuple[memoryview, ...]
    """Each source's bytes of the window, in order; valid until the next one is asked for."""


class Fetcher:
    """Iterates over a task's windows, filled; a thread of its own fills one buffer while the other is merged.

    A failing read is raised where the window would have come. Leaving the `with` block early stops the reading.
    """

    def __init__(self, storage: Storage, fetches: Iterable[Fetch], buffer_nbytes: int) -> None:
        self._storage = storage
        self._fetches = fetches
        self._buffers = [POOL.acquire(max(1, buffer_nbytes)) for _ in range(NUM_BUFFERS)]
        self._empty: queue.SimpleQueue[mmap.mmap | None] = queue.SimpleQueue()
        self._filled: queue.SimpleQueue[tuple[mmap.mmap, list[Filled]] | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._fill_all, name="fetch", daemon=True)

    def __enter__(self) -> Fetcher:
        for buffer in self._buffers:
            self._empty.put(buffer)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._empty.put(None)
        self._thread.join()
        for buffer in self._buffers:
            POOL.release(buffer)

    def __iter__(self) -> Iterator[Filled]:
        while (item := self._filled.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            buffer, windows = item
            yield from windows
            self._empty.put(buffer)

    def _fill_all(self) -> None:
        try:
            for fetch in self._fetches:
                buffer = self._empty.get()
                if buffer is None:
                    return
                windows = _lay_out(fetch, memoryview(buffer))
                self._storage.read_into(
                    [r for filled in windows for r in filled.window.ranges()],
                    [view for filled in windows for view in filled.views],
                )
                self._filled.put((buffer, windows))
            self._filled.put(None)
        except BaseException as error:  # raised where the window would have come
            self._filled.put(error)


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
