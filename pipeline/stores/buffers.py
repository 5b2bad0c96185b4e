"""Memory that is used again: fresh pages cost more than reading a file does."""

from __future__ import annotations

import mmap
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class BufferPool:
    """Page-aligned buffers, kept by size when they are given back. Safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._free: dict[int, list[mmap.mmap]] = defaultdict(list)

    def acquire(self, nbytes: int) -> mmap.mmap:
        """Return a buffer of this size, with whatever it holds."""
        with self._lock:
            if self._free[nbytes]:
                return self._free[nbytes].pop()
        # Private: a forked process must not share what it is given here with the others.
        buffer = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE") and nbytes >= 2**21:
            buffer.madvise(mmap.MADV_HUGEPAGE)
        return buffer

    def release(self, buffer: mmap.mmap) -> None:
        """Give a buffer back; nothing may look at it any more."""
        with self._lock:
            self._free[len(buffer)].append(buffer)

    def close(self) -> None:
        """Free the buffers that were given back. The pool can still be used."""
        with self._lock:
            self._free.clear()

    @contextmanager
    def lend(self, nbytes: int, count: int, *, keep: bool = True) -> Iterator[list[memoryview]]:
        """Have so many buffers for a while.

        Args:
            nbytes: of each.
            count: how many.
            keep: whether they are kept for whoever wants such buffers next; if not, what is kept makes room for them.
        """
        if not keep:
            self.close()
        buffers = [self.acquire(max(1, nbytes)) for _ in range(count)]
        try:
            yield [memoryview(buffer) for buffer in buffers]
        finally:
            for buffer in buffers if keep else ():
                self.release(buffer)
