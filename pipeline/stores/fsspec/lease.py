"""What a lock needs of a store, put together for stores that have no conditional writes."""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from datetime import UTC, datetime

from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.loop import run_bounded
from raymerge.pipeline.stores.seam import Sharing

EXCLUSIVE = threading.RLock()
"""Held by a thread from looking at a file until it has changed it, where the store cannot do both in one step."""


class FsspecLeases:
    """Best effort: it looks first and writes then, so that two processes that do so at the same moment both succeed.

    Within one process, and so in memory://, it is exact.
    """

    def __init__(self, storage: FsspecFiles) -> None:
        self._storage = storage

    def create(self, url: str, data: bytes) -> str | None:
        """Write an object unless there is one, and return its etag; None where there is one."""
        try:
            return self._storage.write(url, data, exclusive=True).etag
        except FileExistsError:
            return None

    def replace(self, url: str, data: bytes, etag: str) -> str | None:
        """Write an object that has this etag still, and return its new one; None where it has not, or is gone."""
        with EXCLUSIVE:
            try:
                if self._storage.stat(url).etag != etag:
                    return None
            except FileNotFoundError:
                return None
            return self._storage.write(url, data).etag

    def read_with_age(self, url: str) -> tuple[bytes, str, float] | None:
        """Return an object's content, etag, and the seconds since it was written; None if gone.

        The etag is asked for first: where the object changes in between, it is too old, and nothing can be replaced.
        """

        def read() -> bytes:
            filesystem, path = self._storage.locate(url)
            content: bytes = run_bounded(filesystem, "cat_file", path)
            return content

        with EXCLUSIVE:
            try:
                etag = self._storage.stat(url).etag
                return self._storage.ask("GET", url, read), etag, self._age(url)
            except FileNotFoundError:
                return None

    def delete_if(self, url: str, etag: str) -> None:
        """Delete an object if it has this etag still."""
        with EXCLUSIVE:
            if self._storage.stat(url).etag == etag:
                self._storage.remove(url, is_once=True)

    def _age(self, url: str) -> float:
        """Return the seconds since a file was written; 0 where the store does not tell, so that it is never too old.

        The store's time is that of another file written just now.
        """
        try:
            written = self._modified(url)
            if self._storage.sharing is Sharing.THREADS:
                return (datetime.now(UTC) - written).total_seconds()
            probe = f"{url}.{secrets.token_hex(8)}"
            self._storage.write(probe, b"")
            try:
                return (self._modified(probe) - written).total_seconds()
            finally:
                with suppress(OSError):
                    self._storage.remove(probe)
        except NotImplementedError:
            return 0.0

    def _modified(self, url: str) -> datetime:
        filesystem, path = self._storage.locate(url)
        modified: datetime = filesystem.modified(path)
        return modified
