"""Streams one output file: header, then tensors in order; a thread of its own hashes them and waits for the store."""

from __future__ import annotations

import mmap
import queue
import threading
from typing import TYPE_CHECKING

from raymerge.pipeline.engine.digests import Digest
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.seam import Writer

if TYPE_CHECKING:
    import torch


class ShardWriter:
    """Collects bytes in buffers, and hands each full one to a thread that hashes and writes it.

    `append` any number of times, then `close`, `finish` and `commit`; on an error, `abort`.
    """

    nbytes: int
    """Appended so far."""

    def __init__(self, writer: Writer, pool: BufferPool, digest: Digest) -> None:
        self.nbytes = 0
        self._pool = pool
        self._writer = writer
        self._digest = digest
        self._free = threading.Semaphore(writer.num_buffers)
        self._full: queue.SimpleQueue[tuple[mmap.mmap, int] | None] = queue.SimpleQueue()
        self._current: mmap.mmap | None = None
        """Is being filled; there is one as soon as something is to be appended."""
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
            room = self.reserve()
            num_bytes = min(len(data), len(room))
            room[:num_bytes] = data[:num_bytes]
            self.advance(num_bytes)
            data = data[num_bytes:]

    def reserve(self) -> memoryview:
        """Return the room that is left in the current buffer, or that of the next one where it is full.

        Raises:
            OutputError: an earlier write failed.
        """
        if self._current is None:
            self._current = self._acquire()
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
            room = self.reserve()
            num_values = min(len(values), len(room) // dtype.itemsize)
            torch.frombuffer(room, dtype=dtype, count=num_values).copy_(values[:num_values])
            self.advance(num_values * dtype.itemsize)
            values = values[num_values:]

    def close(self) -> None:
        """Hand over what is left. Of several shards, each is closed before any is finished."""
        self._hand_over()
        self._full.put(None)

    def finish(self) -> str:
        """Return the sha256 of everything, in hex, when it is written.

        Raises:
            OutputError: a write failed.
        """
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
        if self._current is not None:
            self._release(self._current)
            self._current = None
        self._end()
        self._writer.abort()

    def advance(self, num_bytes: int) -> None:
        """Take what has been written to the first bytes of the reserved room as appended."""
        self.nbytes += num_bytes
        self._num_used += num_bytes
        if self._num_used == self._writer.buffer_nbytes:
            self._hand_over()

    def _hand_over(self) -> None:
        buffer, num_bytes = self._current, self._num_used
        self._current, self._num_used = None, 0
        if buffer is not None:
            self._full.put((buffer, num_bytes))
            self._digest.announce()  # last: after an interrupt in between, nobody waits for a piece that never comes

    def _acquire(self) -> mmap.mmap:
        """Return a buffer, as soon as there may be one more.

        Raises:
            OutputError: an earlier write failed.
        """
        if not self._free.acquire(blocking=False):
            with self._digest.waiting():
                self._free.acquire()
        if self._error is not None:
            self._free.release()
            raise self._error
        return self._pool.acquire(self._writer.buffer_nbytes)

    def _release(self, buffer: mmap.mmap) -> None:
        self._pool.release(buffer)
        self._free.release()

    def _end(self) -> None:
        if self._thread.is_alive():
            self._full.put(None)
            with self._digest.waiting():
                self._thread.join()

    def _write_all(self) -> None:
        try:
            self._write_each()
        finally:
            self._digest.close()

    def _write_each(self) -> None:
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
                self._digest.close()
