"""The seam between raymerge and whatever holds files: every byte read or written goes through a `Storage`.

Who calls what: planning calls `pin`, `list`, `stat` and `read_into` for headers; a worker calls `connect`,
`read_into` for the ranges of its task, `open_writer` for its shard, and `check_unchanged` before it commits; the driver
takes the `lock` of the output, keeps its journal there with `write`, `read` and `delete`, and calls `publish` when all
files are committed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from enum import Enum
from mmap import mmap

from raymerge.pipeline.errors import CheckpointError, FetchError
from raymerge.pipeline.stores.files import Buffer, ByteRange, ByteRows, StoredFile

OUTPUT_BUFFER_NBYTES = 4 * 2**20
"""Merged values on their way out; two such buffers are in use, one being filled and one being written."""


class Sharing(Enum):
    """Ways in which processes may use a storage together."""

    FORK = "fork"
    """Processes may be forked from one that has used it."""
    FRESH = "fresh"
    """Each process must have been started without it: it has threads of its own, which a fork would lose."""
    THREADS = "threads"
    """It is in one process only."""


class Writer(ABC):
    """One file being written: `write` or `take` any number of times, then `commit` or `abort` once.

    Nothing is visible under the final name before `commit` returns, and nothing is left behind after `abort`.
    """

    buffer_nbytes = OUTPUT_BUFFER_NBYTES
    """The size of buffer that suits it best."""
    num_buffers = 2
    """Number of these that keep it busy."""

    def take(self, buffer: mmap, nbytes: int, release: Callable[[mmap], None]) -> None:
        """Append the first bytes of a buffer, and call `release` when it is no longer looked at.

        Raises:
            OutputError: as for `write`; the buffer is or will be released all the same.
        """
        try:
            with memoryview(buffer)[:nbytes] as data:
                self.write(data)
        finally:
            release(buffer)

    @abstractmethod
    def write(self, data: Buffer | bytes) -> None:
        """Append bytes; the buffer may be reused as soon as this returns.

        Raises:
            OutputError: the store is full or refuses.
        """

    @abstractmethod
    def commit(self, sha256: str | None = None) -> StoredFile:
        """Make the file durable, and then visible, and return it; it replaces an earlier one unless it is exclusive.

        Args:
            sha256: of what was written, in hex, where the caller has it: a store that needs it need not read the file.

        Raises:
            FileExistsError: it is exclusive, and there is a file of this name.
            CorruptedError: the store has something else than what was written.
            OutputError: fewer bytes were written than announced, or the store refuses.
        """

    @abstractmethod
    def abort(self) -> None:
        """Forget what was written."""


class Lock:
    """A lock that is held."""

    token = ""
    """Content of the lock's file as long as the lock is ours; empty where the lock ends with this process."""

    def check(self) -> None:
        """Make sure that it is still held.

        Raises:
            OutputError: another run has taken it, because this one could not renew it in time.
        """
        return


class Storage(ABC):
    """Files by URL. Built by `Stores`, never pickled; safe to use from several threads."""

    is_remote = False
    """Whether reads wait for a network: they are then begun while earlier bytes are merged."""
    sharing = Sharing.FORK
    read_nbytes = 0
    """Memory that reading takes besides the caller's buffers, in bytes."""
    write_nbytes = 0
    """Memory that one writer takes besides two output buffers, in bytes."""
    library_nbytes = 0
    """Memory that its library takes in a process that reads or writes: threads, connections, arenas; in bytes."""

    @abstractmethod
    def absolute(self, url: str) -> str:
        """Return the one way to write a directory's URL: absolute, without a trailing slash."""

    def resolve(self, url: str) -> str:
        """Return where a file or directory really lies, links followed."""
        return self.absolute(url)

    def pin(self, url: str, revision: str | None) -> str:
        """Return the URL of a directory at a revision that does not move.

        Raises:
            CheckpointError: there are no revisions here, and one is asked for; or there is no such one.
        """
        if revision is not None:
            raise CheckpointError(f"{url}: only a Hub repository has revisions; leave `@{revision}` out")
        return self.absolute(url)

    @abstractmethod
    def stat(self, url: str) -> StoredFile:
        """Return size and etag.

        Raises:
            FileNotFoundError: there is no such file.
            FetchError: the store refuses or is down.
        """

    @abstractmethod
    def list(self, url: str) -> Mapping[str, StoredFile]:
        """Return the files below a directory, at any depth, by relative name, sorted; none where it is not.

        Raises:
            FetchError: the store refuses or is down.
        """

    @abstractmethod
    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0) -> None:
        """Fill each buffer with its range; neighbouring ranges are read together.

        Args:
            ranges: in any order.
            buffers: as large as the ranges.
            max_gap: so many bytes may be read, and thrown away, between two ranges where that spares a request.

        Raises:
            FetchError: a range could not be read whole, or its file is no longer the one that was planned with.
        """

    def read_rows(self, rows: ByteRows, buffer: Buffer) -> None:
        """Fill a buffer with rows, one after the other.

        Raises:
            FetchError: as for `read_into`.
        """
        nbytes = rows.row_nbytes
        ranges = [ByteRange(rows.file, start, start + nbytes) for start in rows.starts.tolist()]
        self.read_into(ranges, [buffer[k * nbytes : (k + 1) * nbytes] for k in range(len(ranges))])

    def will_read(self, ranges: Sequence[ByteRange]) -> None:
        """Take a hint: these ranges are read next. Never fails."""
        return

    def connect(self, url: str) -> None:
        """Build what requests to a file need, such as clients; workers do so before they measure a shard's memory.

        Raises:
            FetchError: there are no usable settings or credentials.
        """
        return

    @abstractmethod
    def check_unchanged(self, file: StoredFile) -> None:
        """Compare a file with what it was when the plan was made.

        Raises:
            FetchError: it has changed.
        """

    @abstractmethod
    def open_writer(self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False) -> Writer:
        """Begin a file of exactly `nbytes` bytes.

        Args:
            url: its final name.
            nbytes: its size.
            partial_url: where it lies until it is committed, in a store that cannot hide it.
            exclusive: whether it must not replace a file.

        Raises:
            OutputError: the store is full or refuses.
        """

    def check_space(self, url: str, nbytes: int) -> None:
        """Make sure, as far as it can be known, that this much more can be written below a directory.

        Raises:
            OutputError: there is no room for it.
        """
        return

    @abstractmethod
    def delete(self, url: str) -> None:
        """Delete a file; one that is not there is as good as deleted."""

    @abstractmethod
    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:
        """Hold a lock that does not outlive this process for long.

        Args:
            url: of the lock.
            restart: whether what an interrupted run has prepared may be thrown away, if it can no longer be published.

        Raises:
            OutputError: another run holds it, or the store refuses.
        """

    def explain_part(self, url: str) -> str:
        """Return why a listing may lack files of a directory, and the way to them; empty where it is complete."""
        return ""

    def advise_download(self, url: str) -> str:
        """Return how to get the files that are missing in a directory."""
        return self.explain_part(url) or "download the checkpoint again"

    def publish(self, url: str, message: str, last: Collection[str] = ()) -> None:
        """Make everything visible that was committed below a directory, in a store where that takes steps of its own.

        Args:
            url: of the directory.
            message: what the store may say about it.
            last: names of files there without which nothing loads: of several steps, the last brings them.

        Raises:
            OutputError: somebody else has changed the directory meanwhile, or the store refuses.
        """
        return

    def gather(self, url: str, members: Sequence[str]) -> str:
        """Show directories together, in a store that has a place for that; return where, or nothing.

        Args:
            url: of the directory that they belong to, after which it is called.
            members: their URLs; those that are shown there already stay.

        Raises:
            OutputError: the store refuses.
        """
        return ""

    def close(self) -> None:
        """Let go of open files and connections; the storage can still be used, and opens them again."""
        return

    def read(self, url: str, max_nbytes: int) -> bytes:
        """Return a small file's content.

        Raises:
            FileNotFoundError: there is no such file.
            FetchError: it is larger than `max_nbytes`.
        """
        file = self.stat(url)
        if file.nbytes > max_nbytes:
            raise FetchError(f"{url}: {file.nbytes:,} bytes, at most {max_nbytes:,} expected in such a file")
        return self.read_ranges([ByteRange(file, 0, file.nbytes)])[0]

    def read_ranges(self, ranges: Sequence[ByteRange]) -> tuple[bytes, ...]:
        """Return the content of some small ranges; see `read_into`."""
        contents = [bytearray(place.nbytes) for place in ranges]
        self.read_into(ranges, [memoryview(content) for content in contents])
        return tuple(bytes(content) for content in contents)

    def write(self, url: str, data: Buffer | bytes, *, exclusive: bool = False) -> StoredFile:
        """Write a small file in one go.

        Raises:
            FileExistsError: it is exclusive, and there is a file of this name.
            OutputError: the store is full or refuses.
        """
        writer = self.open_writer(url, len(data), exclusive=exclusive)
        try:
            writer.write(data)
        except BaseException:
            writer.abort()
            raise
        return writer.commit()
