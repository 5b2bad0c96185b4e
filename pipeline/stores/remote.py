"""Reads from stores behind a network: many requests at once, and bodies that break in the middle."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from threading import Lock as ThreadLock
from typing import Protocol, TypeVar

from raymerge.pipeline.errors import FetchError, MergeError
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.ranges import ReadGroup, coalesce
from raymerge.pipeline.stores.retry import Fault, FaultLog, Patience, one_line, retry
from raymerge.pipeline.stores.seam import Sharing, Storage

T = TypeVar("T")

NUM_REQUESTS = 24
"""Requests in flight for the reads of one process: as many as two input buffers have pieces."""

PIECE_NBYTES = 6 * 2**20
"""Most that one request asks for: large enough that its latency is small beside it, and a part of an upload to S3.

All requests in flight together are what a line of 10 Gbit/s carries in 0.1 s.
"""

CHUNK_NBYTES = 128 * 2**10
"""About what a request holds of a body at a time that comes in memory of its library; larger chunks are fresh memory
each, which costs more than calls."""

REQUEST_SECONDS = 20
"""Longest that a request may take, and that a connection may be silent."""

LEAST_NBYTES = 16 * 2**10
"""Fewer bytes in a request's time are no progress; a request on a slow line asks for as few."""


class Body(Protocol):
    """The bytes of an answer, as they come."""

    def readinto(self, buffer: Buffer) -> int:
        """Put the bytes that come next into a buffer, or into its beginning, and return how many; 0 at the end."""


class ChunkBody:
    """A body that comes in memory of its library."""

    def __init__(self, chunks: Iterator[Buffer | bytes]) -> None:
        self._chunks = chunks
        self._rest = memoryview(b"")

    def readinto(self, buffer: Buffer) -> int:
        """Copy from a chunk."""
        while not self._rest:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._rest = memoryview(chunk).cast("B")
        count = min(self._rest.nbytes, buffer.nbytes)
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count


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
    def open_range(self, file: StoredFile, start: int, stop: int) -> AbstractContextManager[Body]:
        """Make one request for bytes [start, stop) and return its body.

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

    def read_into(  # noqa: D102
        self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0
    ) -> None:
        views = [buffer.cast("B") for buffer in buffers]
        for item, view in zip(ranges, views, strict=True):
            if view.nbytes != item.nbytes:
                raise ValueError(f"a buffer of {view.nbytes} bytes for a range of {item.nbytes}")
            item.check()
        groups = coalesce(ranges, max_nbytes=PIECE_NBYTES, max_gap=max_gap)
        unwanted = memoryview(bytearray(max_gap))
        pieces = [piece for group in groups for piece in _cut(group, ranges, views, unwanted)]
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
        mark = piece.start
        wanted_nbytes = PIECE_NBYTES
        while piece.start < piece.stop:
            before, started = piece.start, time.monotonic()
            stop = min(piece.stop, before + wanted_nbytes)
            try:
                with self.open_range(file, before, stop) as body:
                    self.faults.note_answer(self.store_name(file.url))
                    while piece.fill(body, stop):
                        if piece.start - mark >= LEAST_NBYTES:
                            patience.succeeded()
                            mark = piece.start
                if piece.start < stop:
                    raise _ShortBodyError(f"the body ended at byte {piece.start:,}")
                patience.succeeded()
                mark = piece.start
                if time.monotonic() - started < REQUEST_SECONDS / 4:
                    wanted_nbytes = min(2 * wanted_nbytes, PIECE_NBYTES)
            except (FetchError, FileNotFoundError) as error:
                raise FetchError(str(error)) from None
            except Exception as error:
                if time.monotonic() - started > REQUEST_SECONDS / 2:
                    wanted_nbytes = max((piece.start - before) // 2, LEAST_NBYTES)
                fault = Fault("short body") if isinstance(error, _ShortBodyError) else self.classify(error)
                if fault is None:
                    raise self.explain(error, file.url) from None
                if not patience.failed(fault):
                    raise FetchError(
                        f"{self.store_name(file.url)}: GET of {file.url}, bytes {piece.start:,} to {piece.stop:,}:"
                        f" {patience.summary}: {one_line(error)}"
                    ) from None


class _ShortBodyError(Exception):
    """A body ended before it should."""


class _Piece:
    """Bytes of a file that are still to be read, and where they go."""

    def __init__(
        self, file: StoredFile, start: int, stop: int, targets: Sequence[tuple[int, Buffer]], unwanted: Buffer
    ) -> None:
        """Begin.

        Args:
            file: to read from.
            start: first byte.
            stop: after the last.
            targets: views by their start in the file, which may overlap, and have gaps between them.
            unwanted: gets what is in gaps; as large as any.
        """
        self.file = file
        self.start = start
        self.stop = stop
        self._places: list[tuple[int, Buffer]] = []
        self._doubles: list[tuple[int, Buffer]] = []
        """Views, or parts of them, whose bytes are in places as well."""
        self._number = 0
        """Number of the place that is filled next."""
        reached = start
        for first, view in targets:
            if first < reached:
                self._doubles.append((first, view[: reached - first]))
            elif first > reached:
                self._places.append((reached, unwanted[: first - reached]))
                reached = first
            if first + view.nbytes > reached:
                self._places.append((reached, view[reached - first :]))
                reached = first + view.nbytes
        if reached < stop:
            self._places.append((reached, unwanted[: stop - reached]))

    def fill(self, body: Body, stop: int) -> bool:
        """Read what comes next, before `stop`, and return False at the end of the body.

        Raises:
            FetchError: the body is longer than what was asked for.
        """
        if self.start == stop:
            if body.readinto(memoryview(bytearray(1))):
                raise FetchError(f"{self.file.url}: more bytes than were asked for; is it behind a broken proxy?")
            return False
        first, view = self._places[self._number]
        count = body.readinto(view[self.start - first : stop - first])
        self.start += count
        self._number += self.start == first + view.nbytes
        if self.start == self.stop:
            self._fill_doubles()
        return count > 0

    def _fill_doubles(self) -> None:
        for first, view in self._doubles:
            for start, place in self._places:
                begin, end = max(first, start), min(first + view.nbytes, start + place.nbytes)
                if begin < end:
                    view[begin - first : end - first] = place[begin - start : end - start]


def _cut(group: ReadGroup, ranges: Sequence[ByteRange], views: Sequence[Buffer], unwanted: Buffer) -> Iterator[_Piece]:
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
        yield _Piece(group.file, start, stop, targets, unwanted)


def _finish(pending: Sequence[Future[None]]) -> None:
    """Wait for all, so that nobody writes to the buffers any more, and raise the first error."""
    wait(pending, return_when="FIRST_EXCEPTION")
    for future in pending:
        future.cancel()
    wait(pending)
    for future in pending:
        if not future.cancelled():
            future.result()
