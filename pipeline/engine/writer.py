"""Streams one output file: header, then tensors in order; a thread of its own hashes them and waits for the store."""

from __future__ import annotations

import hashlib
import mmap
import queue
import threading
from typing import TYPE_CHECKING

from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.seam import Writer

if TYPE_CHECKING:
    import torch


class ShardWriter:
    """Collects bytes in buffers, and hands each full one to a thread that hashes and writes it.

    `append` any number of times, then `finish`, then `commit`; on an error, `abort`.
    """

    nbytes: int
    """Appended so far."""

    def __init__(self, writer: Writer, pool: BufferPool) -> None:
        self.nbytes = 0
        self._pool = pool
        self._writer = writer
        self._digest = hashlib.sha256()
        self._free = threading.Semaphore(writer.num_buffers)
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        self._current = self._acquire()
        self._num_used = 0
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._write_all, name="write", daemon=True)
        self._thread.start()

    def append_bytes(self, data: bytes | memoryview) -> None:
        """Append bytes as they are.

        Raises:
            OutputError: an earlier write failed.
        """
        data = memoryview(data)
        while data:
            num_bytes = min(len(data), self._writer.buffer_nbytes - self._num_used)
            self._current[self._num_used : self._num_used + num_bytes] = data[:num_bytes]
            self.advance(num_bytes)
            data = data[num_bytes:]

    def reserve(self) -> memoryview:
        """Return the room that is left in the current buffer; there is some, and more where it is full."""
        return memoryview(self._current)[self._num_used : self._writer.buffer_nbytes]

    def append(self, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append a tensor's values, rounded to a dtype.

        Args:
            values: flat.
            dtype: of whole bytes; everything appended before ends at a multiple of its size.

        Raises:
            OutputError: an earlier write failed.
        """
        import torch

        while len(values):
            num_values = min(len(values), (self._writer.buffer_nbytes - self._num_used) // dtype.itemsize)
            torch.frombuffer(self._current, dtype=dtype, count=num_values, offset=self._num_used).copy_(
                values[:num_values]
            )
            self.advance(num_values * dtype.itemsize)
            values = values[num_values:]

    def finish(self) -> str:
        """Write what is left and return the sha256 of everything, in hex.

        Raises:
            OutputError: a write failed.
        """
        self._full.put((self._current, self._num_used))
        self._end()
        if self._error is not None:
            raise self._error
        return self._digest.hexdigest()

    def commit(self) -> StoredFile:
        """Make the finished file visible, and return it as it is stored.

        Raises:
            CorruptedError: the store has something else than what was written.
            OutputError: the store refuses.
        """
        return self._writer.commit(self._digest.hexdigest())

    def abort(self) -> None:
        """Stop, and forget what was written."""
        is_handed_over = self._num_used == self._writer.buffer_nbytes  # and there was no memory for another one
        if self._thread.is_alive() and not is_handed_over:
            self._release(self._current)
        self._end()
        self._writer.abort()

    def advance(self, num_bytes: int) -> None:
        """Take what has been written to the first bytes of the reserved room as appended.

        Raises:
            OutputError: an earlier write failed.
        """
        self.nbytes += num_bytes
        self._num_used += num_bytes
        if self._num_used == self._writer.buffer_nbytes:
            self._full.put((self._current, self._num_used))
            self._current = self._acquire()
            self._num_used = 0
            if self._error is not None:
                raise self._error

    def _acquire(self) -> mmap.mmap:
        """Return a buffer, as soon as there may be one more."""
        self._free.acquire()
        return self._pool.acquire(self._writer.buffer_nbytes)

    def _release(self, buffer: mmap.mmap) -> None:
        self._pool.release(buffer)
        self._free.release()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            self._thread.join()

    def _write_all(self) -> None:
        while (item := self._full.get()) is not None:
            buffer, num_bytes = item
            if self._error is not None:
                self._release(buffer)
                continue
            try:
                with memoryview(buffer)[:num_bytes] as data:
                    self._digest.update(data)
                self._writer.take(buffer, num_bytes, self._release)
            except BaseException as error:  # raised at the next append, or by finish
                self._error = error
