"""Reads a whole file in pieces."""

from __future__ import annotations

from collections.abc import Iterator

from raymerge.pipeline.stores.buffers import POOL
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.seam import storage_for

PIECE_NBYTES = 4 * 2**20


def read_pieces(file: StoredFile) -> Iterator[Buffer]:
    """Yield a file's bytes in order; each piece is valid until the next is asked for.

    Raises:
        FetchError: the file could not be read, or has changed.
    """
    storage = storage_for(file.url)
    buffer = POOL.acquire(PIECE_NBYTES)
    try:
        for start in range(0, file.nbytes, PIECE_NBYTES):
            piece = ByteRange(file, start, min(start + PIECE_NBYTES, file.nbytes))
            view = memoryview(buffer)[: piece.nbytes]
            storage.read_into([piece], [view])
            yield view
    finally:
        POOL.release(buffer)
