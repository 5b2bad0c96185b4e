"""What is said of a file that is no longer the one that was planned with; the same in every store."""

from __future__ import annotations

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile


def check_same(file: StoredFile, nbytes: int, etag: str) -> None:
    """Compare a file as it was planned with to what is there now.

    Raises:
        FetchError: it has changed.
    """
    if (nbytes, etag) != (file.nbytes, file.etag):
        raise changed(file, f"{nbytes:,} bytes, etag {etag}")


def changed(file: StoredFile, found: str) -> FetchError:
    """Return what to raise where a file has changed.

    Args:
        file: as it was planned with.
        found: what is there now.
    """
    return FetchError(
        f"{file.url}: changed since the plan was made: expected {file.nbytes:,} bytes, etag {file.etag};"
        f" found {found}. Run again when nobody writes to it"
    )
