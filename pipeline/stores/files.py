"""Files and byte ranges of them, as every store knows them, and errors for files that changed after planning."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = memoryview
"""A writable, contiguous view of bytes."""

ALIGNMENT = 64
"""Each range starts at a multiple of this in an input buffer."""

_UNIQUE_ETAGS = ("file", "s3", "gs", "az", "hf")
"""Elsewhere they may be made of size and time alone."""


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file as it was when the plan was made."""

    url: str
    nbytes: int
    etag: str
    """Changes when the content does; for local files made of size, time of change and inode."""

    def __hash__(self) -> int:
        """Return a hash that takes no time to speak of: merges of many adapters look files up by the million."""
        return hash(self.url)

    @property
    def content_id(self) -> str:
        """Identity of the content: the etag, and the URL where two files may share an etag."""
        return self.etag if scheme_of(self.url) in _UNIQUE_ETAGS else f"{self.url} {self.etag}"


@dataclass(frozen=True, slots=True)
class ByteRange:
    """Bytes [start, stop) of a file."""

    file: StoredFile
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        """Bytes that it spans."""
        return self.stop - self.start

    def check(self) -> None:
        """Make sure that the file has these bytes; raises FetchError."""
        if self.stop > self.file.nbytes:
            raise FetchError(
                f"{self.file.url}: bytes {self.start:,} to {self.stop:,} were asked for,"
                f" and the file has {self.file.nbytes:,}"
            )


@dataclass(frozen=True, slots=True, eq=False)
class ByteRows:
    """Stretches of a file that are all of one length, in any order: rows of a matrix."""

    file: StoredFile
    starts: NDArray[np.int64]
    """First byte of each."""
    row_nbytes: int
    """Length of each, in bytes."""

    @property
    def nbytes(self) -> int:
        """Bytes of all together."""
        return len(self.starts) * self.row_nbytes

    def list_runs(self) -> tuple[list[int], list[int]]:
        """Return, of rows that follow each other both here and in the file, the first byte, and how many they are."""
        steps = self.starts[1:] - self.starts[:-1]
        bounds = [0, *((steps != self.row_nbytes).nonzero()[0] + 1).tolist(), len(self.starts)]
        return self.starts[bounds[:-1]].tolist(), [stop - start for start, stop in pairwise(bounds)]


def aligned(nbytes: int) -> int:
    """Round up to where the next range may start in a buffer.

    >>> aligned(1), aligned(64)
    (64, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def check_same(file: StoredFile, nbytes: int, etag: str) -> None:
    """Compare a file as it was planned with to what is there now.

    Raises:
        FetchError: it has changed.
    """
    if (nbytes, etag) != (file.nbytes, file.etag):
        raise changed(file, f"{nbytes:,} bytes, etag {etag}")


def changed(file: StoredFile, found: str) -> FetchError:
    """Return the error for a file that has changed.

    Args:
        file: as it was planned with.
        found: what is there now.
    """
    return FetchError(
        f"{file.url}: changed since the plan was made: expected {file.nbytes:,} bytes, etag {file.etag};"
        f" found {found}. Run again when nobody writes to it"
    )
