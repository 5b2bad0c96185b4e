"""One object being written: whole in one request if it is small, in parts if it is not."""

from __future__ import annotations

import errno
import mmap
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

import obstore
from awscrt.checksums import crc64nvme

from raymerge.pipeline.errors import CorruptedError, OutputError, StalledError
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.objects.bucket import Bucket
from raymerge.pipeline.stores.objects.errors import ObjectError, translated
from raymerge.pipeline.stores.seam import Writer

if TYPE_CHECKING:
    from obstore import ObjectMeta, PutMode

PART_NBYTES = 8 * 2**20
"""Size of a part; larger where a file would have more parts than stores take."""

NUM_PARTS = 4
"""On their way at once."""

NUM_BUFFERS = NUM_PARTS + 2
"""Parts in memory: those on their way, one that waits, and the one that is being filled."""


_MAX_PARTS = 10_000
_ALIGNMENT = 64
_MAX_EXCLUSIVE_NBYTES = 64 * 2**20
_MAX_QUICK_NBYTES = 2**20
"""Most that a slow line sends in the time of an ordinary request."""


class ObjectWriter(Writer):
    """Writes an object, which is there when all of it is.

    An S3 store computes the CRC64NVME of what arrived; it is compared with that of what was sent.
    """

    def __init__(self, bucket: Bucket, pool: BufferPool, url: str, key: str, nbytes: int, *, exclusive: bool) -> None:
        if exclusive and nbytes > _MAX_EXCLUSIVE_NBYTES:
            raise ValueError(f"{url}: {nbytes:,} bytes cannot be written so that they replace nothing")
        bucket.probe(key)
        self._bucket = bucket
        self._url = url
        self._key = key
        self._nbytes = nbytes
        self._exclusive = exclusive
        self._num_written = 0
        self._checksum = 0
        self._content: bytearray | None = None
        self._parts: _Parts | None = None
        if exclusive or nbytes <= PART_NBYTES:
            self._content = bytearray()
        else:
            self.buffer_nbytes = max(PART_NBYTES, -(-nbytes // _MAX_PARTS // _ALIGNMENT) * _ALIGNMENT)
            self.num_buffers = NUM_BUFFERS
            self._parts = _Parts(bucket, pool, key, self.buffer_nbytes)

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        view = memoryview(data).cast("B")
        self._count(view)
        if self._content is not None:
            self._content += view
        elif self._parts is not None:
            try:
                self._parts.write(view)
            except ObjectError as error:
                raise self._failed(error) from None

    def take(self, buffer: mmap.mmap, nbytes: int, release: Callable[[mmap.mmap], None]) -> None:
        """Append a whole part without copying it."""
        if self._parts is None or not self._parts.is_at_start:
            super().take(buffer, nbytes, release)
            return
        part = memoryview(buffer)[:nbytes]
        weakref.finalize(part, release, buffer).atexit = False
        self._count(part)
        try:
            self._parts.send(part)
        except ObjectError as error:
            raise self._failed(error) from None
        finally:
            del part

    def _count(self, data: Buffer) -> None:
        if self._num_written + data.nbytes > self._nbytes:
            given = self._num_written + data.nbytes
            raise OutputError(f"{self._url}: {given:,} bytes given, {self._nbytes:,} were announced")
        self._num_written += data.nbytes
        if self._parts is not None:
            self._checksum = crc64nvme(data, self._checksum)

    def commit(self, sha256: str | None = None) -> StoredFile:  # noqa: D102
        if self._num_written != self._nbytes:
            self.abort()
            raise OutputError(f"{self._url}: {self._num_written:,} bytes given, {self._nbytes:,} were announced")
        if self._content is not None:
            content, self._content = bytes(self._content), None
            return self._put(content)
        assert self._parts is not None
        try:
            self._parts.complete()
        except ObjectError as error:
            if error.status != 404 or not self._is_committed():  # no such upload: an earlier answer was lost
                raise self._failed(error) from None
        self._parts = None
        file, checksum = self._find()
        if (file.nbytes, checksum) not in ((self._nbytes, self._checksum), (self._nbytes, None)):
            self._delete()
            raise CorruptedError(
                f"{self._url}: {self._nbytes:,} bytes with CRC64NVME {self._checksum:016x} were written;"
                f" the store has {file.nbytes:,} with {checksum or 0:016x}; they were deleted"
            )
        self._sweep()
        return file

    def abort(self) -> None:  # noqa: D102
        self._content = None
        parts, self._parts = self._parts, None
        if parts is None or not self._bucket.answers(self._key):  # it would be tried for long; the next run sweeps
            return
        with suppress(ObjectError):  # it has ended, or cannot be ended now
            parts.abort()

    def _put(self, content: bytes) -> StoredFile:
        mode: PutMode = "create" if self._exclusive else "overwrite"
        may_take_long = len(content) > _MAX_QUICK_NBYTES
        store = self._bucket.puts if may_take_long else self._bucket.reads
        num_tries = 0

        def put() -> StoredFile:
            nonlocal num_tries
            num_tries += 1
            try:
                etag = self._bucket.put(store, self._key, content, mode)
            except ObjectError as error:
                if not self._exclusive or error.status not in (409, 412) or error.as_fault():
                    raise
                if num_tries == 1 or not self._holds(content):
                    raise FileExistsError(errno.EEXIST, "there is such an object already", self._url) from None
                return self._find()[0]  # the answer to an earlier try was lost
            return StoredFile(self._url, len(content), unquoted(etag))

        return self._bucket.write("PUT", self._url, put, least_tries=2 if may_take_long else 1)

    def _holds(self, content: bytes) -> bool:
        with translated("GET"):
            return bytes(obstore.get(self._bucket.reads, self._key).bytes()) == content

    def _is_committed(self) -> bool:
        with suppress(OSError):
            file, checksum = self._find()
            return file.nbytes == self._nbytes and checksum in (self._checksum, None)
        return False

    def _find(self) -> tuple[StoredFile, int | None]:
        """Return the object as it is stored, and its checksum where the store has one."""

        def find() -> tuple[StoredFile, int | None]:
            if self._bucket.aws is None or not self._bucket.abilities.has_checksums:
                with translated("HEAD"):
                    return stored_file(self._url, obstore.head(self._bucket.reads, self._key)), None
            nbytes, etag, checksum = self._bucket.aws.read_crc64nvme(self._bucket.name, self._key, self._bucket.region)
            return StoredFile(self._url, nbytes, unquoted(etag)), checksum

        return self._bucket.write("HEAD", self._url, find)

    def _failed(self, error: ObjectError) -> OutputError:
        """Return the error to raise, and leave nothing behind."""
        if not error.status:  # the request that failed last may be the one that was to abort
            error.method = "upload"
        # Where the store answers, something happened to this upload, and another may go well.
        is_worth_another = error.as_fault() is not None and self._bucket.answers(self._key)
        is_stalled = self._bucket.is_stalled(error)
        kind = (StalledError if is_stalled else CorruptedError) if is_worth_another else OutputError
        stuck = f"; it was stuck for {error.seconds:.0f} s" if is_stalled else ""
        failure = kind(f"{self._bucket.explain(error, self._url)}{stuck}")
        self.abort()
        return failure

    def _delete(self) -> None:
        with suppress(ObjectError), translated("DELETE"):
            obstore.delete(self._bucket.reads, self._key)

    def _sweep(self) -> None:
        """Abort uploads of this object that earlier tries have left, or a slower worker goes on with."""
        if self._bucket.aws is not None:
            self._bucket.aws.abort_uploads(self._bucket.name, self._key, self._bucket.region)


class _Parts:
    """A multipart upload of whole parts, or of bytes, which are copied to buffers that are used again."""

    def __init__(self, bucket: Bucket, pool: BufferPool, key: str, part_nbytes: int) -> None:
        self._upload = obstore.open_writer(bucket.writes, key, buffer_size=part_nbytes, max_concurrency=NUM_PARTS)
        self._pool = pool
        self._part_nbytes = part_nbytes
        self._free = threading.Semaphore(NUM_BUFFERS)
        self._buffer: mmap.mmap | None = None
        self._num_used = 0

    @property
    def is_at_start(self) -> bool:
        """Whether a new part begins here."""
        return self._buffer is None

    def send(self, part: Buffer) -> None:
        """Append a part; obstore looks at it until it has arrived, and drops the view then."""
        with translated("PUT"):
            self._upload.write(part)

    def write(self, data: Buffer) -> None:
        """Append bytes, which may change afterwards."""
        while data:
            if self._buffer is None:
                self._free.acquire()
                self._buffer = self._pool.acquire(self._part_nbytes)
            count = min(data.nbytes, self._part_nbytes - self._num_used)
            self._buffer[self._num_used : self._num_used + count] = data[:count]
            self._num_used += count
            data = data[count:]
            if self._num_used == self._part_nbytes:
                self._send()

    def complete(self) -> None:
        """Send the rest, and make one object of all."""
        self._send()
        with translated("POST"):
            self._upload.close()

    def abort(self) -> None:
        """End the upload, and have the store forget what it has."""
        self._send_nothing()
        error = InterruptedError()
        with translated("DELETE"):
            self._upload.__exit__(type(error), error, None)

    def _send(self) -> None:
        """Hand over the buffer."""
        if self._buffer is None:
            return
        part = memoryview(self._buffer)[: self._num_used]
        weakref.finalize(part, _give_back, self._pool, self._buffer, self._free).atexit = False
        self._buffer, self._num_used = None, 0
        self.send(part)

    def _send_nothing(self) -> None:
        if self._buffer is not None:
            _give_back(self._pool, self._buffer, self._free)
            self._buffer = None


def _give_back(pool: BufferPool, buffer: mmap.mmap, free: threading.Semaphore) -> None:
    pool.release(buffer)
    free.release()


def stored_file(url: str, meta: ObjectMeta) -> StoredFile:
    """Return a file from what obstore says of it."""
    return StoredFile(url, meta["size"], unquoted(meta["e_tag"]) or str(meta["last_modified"]))


def unquoted(etag: str | None) -> str:
    """Return an etag without its quotes.

    >>> unquoted('"12ab"'), unquoted('W/"12ab"'), unquoted(None)
    ('12ab', 'W/"12ab"', '')
    """
    return (etag or "").strip('"') if not (etag or "").startswith("W/") else etag or ""


def quoted(etag: str) -> str:
    """Return an etag as a condition wants it.

    >>> quoted("12ab"), quoted('W/"12ab"')
    ('"12ab"', 'W/"12ab"')
    """
    return etag if etag.startswith("W/") else f'"{etag}"'
