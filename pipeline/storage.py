"""The seam between raymerge and whatever holds files: every byte read or written goes through a `Storage`."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache

from raymerge import RaymergeError
from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.types import StoredFile

Buffer = memoryview
"""A writable, contiguous view of bytes."""


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, stop) of a file."""

    file: StoredFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """How many bytes it spans."""
        return self.stop - self.start


class Writer(ABC):
    """One file being written: `write` any number of times, then `commit` or `abort` once.

    Nothing is visible under the final name before `commit` returns, and nothing is left behind after `abort`.
    """

    @abstractmethod
    def write(self, data: Buffer | bytes) -> None:
        """Append bytes; the buffer may be reused as soon as this returns.

        Raises:
            OutputError: the store is full or refuses.
        """

    @abstractmethod
    def commit(self) -> None:
        """Make the file durable, and then visible, replacing an earlier one.

        Raises:
            OutputError: fewer bytes were written than announced, or the store refuses.
        """

    @abstractmethod
    def abort(self) -> None:
        """Forget what was written."""


class Storage(ABC):
    """Files by URL. Built where it is used, never pickled; safe to use from several threads."""

    @abstractmethod
    def stat(self, url: str) -> StoredFile:
        """Return size and etag.

        Raises:
            FileNotFoundError: there is no such file.
        """

    @abstractmethod
    def list(self, url: str) -> list[str]:
        """Return the files below a directory, at any depth, relative to it, sorted; [] where there is none."""

    @abstractmethod
    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:
        """Fill each buffer with its range; neighbouring ranges are read together.

        Raises:
            FetchError: a range could not be read whole, or its file is no longer the one that was planned with.
        """

    def will_read(self, ranges: Sequence[ByteRange]) -> None:
        """Take a hint: these ranges are read next, and may be fetched ahead. Never fails."""
        return

    @abstractmethod
    def check_unchanged(self, file: StoredFile) -> None:
        """Compare a file with what it was when the plan was made.

        Raises:
            FetchError: it has changed.
        """

    @abstractmethod
    def open_writer(self, url: str, nbytes: int, partial_url: str | None = None) -> Writer:
        """Begin a file of exactly `nbytes` bytes, kept at `partial_url` until it is committed.

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

    def delete_tree(self, url: str) -> None:
        """Delete every file below a directory."""
        for name in self.list(url):
            self.delete(f"{url}/{name}")

    @abstractmethod
    def lock(self, url: str) -> AbstractContextManager[None]:
        """Hold a lock that ends with this process at the latest.

        Raises:
            OutputError: another run holds it.
        """

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
        data = bytearray(file.nbytes)
        self.read_into([ByteRange(file, 0, file.nbytes)], [memoryview(data)])
        return bytes(data)

    def write(self, url: str, data: bytes, partial_url: str | None = None) -> None:
        """Write a small file in one go."""
        writer = self.open_writer(url, len(data), partial_url)
        try:
            writer.write(data)
        except BaseException:
            writer.abort()
            raise
        writer.commit()


_SCHEME = re.compile("([A-Za-z][A-Za-z0-9+.-]+):/")


def storage_for(url: str) -> Storage:
    """Return the storage that serves a path or URL; one for the whole process, so that open files are shared.

    Raises:
        RaymergeError: the URL's scheme is not supported.
    """
    scheme = _SCHEME.match(url)
    if scheme and not url.startswith("file:///"):
        raise RaymergeError(
            f"{scheme[1]}: URLs are not supported yet; give a directory on this machine (as a path, or file:///path)"
        )
    return _local_storage()


@cache
def _local_storage() -> Storage:
    from raymerge.pipeline.local_storage import LocalStorage

    return LocalStorage()
