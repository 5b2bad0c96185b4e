"""Reads from stores behind a network: many requests at once, and bodies that break in the middle."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from threading import Lock as ThreadLock
from typing import TypeVar

from raymerge.pipeline.errors import FetchError, MergeError
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.ranges import ReadGroup, coalesce
from raymerge.pipeline.stores.retry import Fault, FaultLog, Patience, one_line, retry
from raymerge.pipeline.stores.seam import Sharing, Storage

T = TypeVar("T")

NUM_REQUESTS = 16
"""Requests in flight for the reads of one process: more than pieces in an input buffer, so that none has to wait."""

PIECE_NBYTES = 8 * 2**20
"""Most that one request asks for: large enough that its latency is small beside it."""

MAX_GAP_NBYTES = 256 * 2**10
"""Bytes that are rather read in vain than asked around with another request."""

CHUNK_NBYTES = 128 * 2**10
"""About what a request holds of its body at a time; larger ones are fresh memory each, which costs more than calls."""

REQUEST_SECONDS = 20
"""Longest that a request may take, and that a connection may be silent."""

LEAST_NBYTES = 16 * 2**10
"""Fewer bytes in a request's time are no progress; a request on a slow line asks for as few."""


class RemoteStorage(Storage):
    """Reads ranges with several requests at once; a subclass knows how to make one.

    A request whose body ends early is taken up again at the byte where it broke. On a slow line requests ask for what
    comes in their time, so that no byte is sent in vain.
    """

    is_remote = True
    sharing = Sharing.FRESH
    read_nbytes = NUM_REQUESTS * 2 * CHUNK_NBYTES

    def __init__(self, faults: FaultLog) -> None:
        self.faults = faults
        self._requesting: ThreadPoolExecutor | None = None
        self._requesting_lock = ThreadLock()

    @abstractmethod
    def store_name(self, url: str) -> str:
        """Return the store of a URL for messages and the record of faults, such as `s3://bucket`."""

    @abstractmethod
    def open_range(self, file: StoredFile, start: int, stop: int) -> AbstractContextManager[Iterator[Buffer | bytes]]:
        """Make one request for bytes [start, stop) and return its body as it comes.

        Raises:
            FetchError: the file has changed, is gone, or may not be read.
            Exception: whatever `classify` knows.
        """

    @abstractmethod
    def classify(self, error: Exception) -> Fault | None:
        """Return the fault that an error is, or None where trying again is useless."""

    @abstractmethod
    def explain(self, error: Exception, url: str) -> FetchError:
        """Return the message for an error that is final: the request, where, and the next step."""

    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:  # noqa: D102
        views = [buffer.cast("B") for buffer in buffers]
        for item, view in zip(ranges, views, strict=True):
            if view.nbytes != item.nbytes:
                raise ValueError(f"a buffer of {view.nbytes} bytes for a range of {item.nbytes}")
            item.check()
        groups = coalesce(ranges, max_gap=MAX_GAP_NBYTES, max_nbytes=PIECE_NBYTES)
        pieces = [piece for group in groups for piece in _cut(group, ranges, views)]
        if len(pieces) == 1:
            self._read_piece(pieces[0])
            return
        pending = [self._requests().submit(self._read_piece, piece) for piece in pieces]
        _finish(pending)

    def close(self) -> None:  # noqa: D102
        with self._requesting_lock:
            requesting, self._requesting = self._requesting, None
        if requesting is not None:
            requesting.shutdown()

    def call(self, operation: str, url: str, function: Callable[[], T], *, least_tries: int = 1) -> T:
        """Carry out a request that may be repeated without harm.

        Args:
            operation: such as GET.
            url: of the file, for messages.
            function: makes the request.
            least_tries: how often it is tried at least, however long that takes.

        Raises:
            FileNotFoundError: as `function` does.
            FetchError: the store refuses or is down.
        """

        def give_up(error: Exception, summary: str) -> Exception:
            return FetchError(f"{self.store_name(url)}: {operation} of {url}: {summary}: {one_line(error)}")

        try:
            return retry(
                function,
                faults=self.faults,
                store=self.store_name(url),
                operation=operation,
                classify=self.classify,
                give_up=give_up,
                least_tries=least_tries,
            )
        except (FileNotFoundError, NotADirectoryError, FileExistsError, MergeError):
            raise
        except Exception as error:
            raise self.explain(error, url) from None

    def _requests(self) -> ThreadPoolExecutor:
        with self._requesting_lock:
            if self._requesting is None:
                self._requesting = ThreadPoolExecutor(NUM_REQUESTS, thread_name_prefix="request")
            return self._requesting

    def _read_piece(self, piece: _Piece) -> None:
        """Read one piece, with as many requests as that takes."""
        file = piece.file
        patience = Patience(self.faults, self.store_name(file.url), "GET")
        offset = mark = piece.start
        wanted_nbytes = PIECE_NBYTES
        while offset < piece.stop:
            before, started = offset, time.monotonic()
            stop = min(piece.stop, offset + wanted_nbytes)
            try:
                with self.open_range(file, offset, stop) as chunks:
                    self.faults.note_answer(self.store_name(file.url))
                    for chunk in chunks:
                        offset = piece.fill(offset, stop, memoryview(chunk).cast("B"))
                        if offset - mark >= LEAST_NBYTES:
                            patience.succeeded()
                            mark = offset
                if offset < stop:
                    raise _ShortBodyError(f"the body ended at byte {offset:,}")
                patience.succeeded()
                mark = offset
                if time.monotonic() - started < REQUEST_SECONDS / 4:
                    wanted_nbytes = min(2 * wanted_nbytes, PIECE_NBYTES)
            except (FetchError, FileNotFoundError) as error:
                raise FetchError(str(error)) from None
            except Exception as error:
                if time.monotonic() - started > REQUEST_SECONDS / 2:
                    wanted_nbytes = max((offset - before) // 2, LEAST_NBYTES)
                fault = Fault("short body") if isinstance(error, _ShortBodyError) else self.classify(error)
                if fault is None:
                    raise self.explain(error, file.url) from None
                if not patience.failed(fault):
                    raise FetchError(
                        f"{self.store_name(file.url)}: GET of {file.url}, bytes {offset:,} to {piece.stop:,}:"
                        f" {patience.summary}: {one_line(error)}"
                    ) from None


class _ShortBodyError(Exception):
    """A body ended before it should."""


class _Piece:
    """Bytes [start, stop) of a file, and the buffers that parts of it go to."""

    def __init__(self, file: StoredFile, start: int, stop: int, targets: Sequence[tuple[int, Buffer]]) -> None:
        self.file = file
        self.start = start
        self.stop = stop
        self._targets = targets  # by start, in the file

    def fill(self, offset: int, stop: int, chunk: Buffer) -> int:
        """Copy a chunk of [offset, stop) that begins at `offset` to where it belongs, and return the offset after it.

        Raises:
            FetchError: it is longer than what was asked for.
        """
        end = offset + chunk.nbytes
        if end > stop:
            raise FetchError(f"{self.file.url}: {end - stop:,} bytes more than asked for; is it behind a broken proxy?")
        for start, view in self._targets:
            first, last = max(offset, start), min(end, start + view.nbytes)
            if first < last:
                view[first - start : last - start] = chunk[first - offset : last - offset]
        return end


def _cut(group: ReadGroup, ranges: Sequence[ByteRange], views: Sequence[Buffer]) -> Iterator[_Piece]:
    """Yield the requests for a group: one, or several of one size for what is longer than a piece."""
    num_pieces = max(1, -(-group.nbytes // PIECE_NBYTES))
    nbytes = max(1, -(-group.nbytes // num_pieces))
    for start in range(group.start, group.stop, nbytes):
        stop = min(start + nbytes, group.stop)
        targets = []
        for member in group.members:
            item = ranges[member]
            first, last = max(start, item.start), min(stop, item.stop)
            if first < last:
                targets.append((first, views[member][first - item.start : last - item.start]))
        if targets:
            yield _Piece(group.file, start, stop, targets)


def _finish(pending: Sequence[Future[None]]) -> None:
    """Wait for all, so that nobody writes to the buffers any more, and raise the first error."""
    wait(pending, return_when="FIRST_EXCEPTION")
    for future in pending:
        future.cancel()
    wait(pending)
    for future in pending:
        if not future.cancelled():
            future.result()
