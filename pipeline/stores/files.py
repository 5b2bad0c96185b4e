"""Files and byte ranges of them, as every store knows them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class StoredFile:
    """One file as it was when the plan was made."""

    url: str
    nbytes: int
    etag: str
    """Changes when the content does; for local files made of size, time of change and inode."""


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
