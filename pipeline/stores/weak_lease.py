"""Locks in stores without conditional writes."""

from __future__ import annotations

import secrets
import threading
from contextlib import suppress
from datetime import UTC, datetime
from typing import Protocol

from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.seam import Sharing

EXCLUSIVE = threading.RLock()
"""Held by a thread from looking at a file until it has changed it, where the store cannot do both in one step."""


class UnconditionalStore(Protocol):
    """The operations of such a store; see `Storage`."""

    sharing: Sharing

    def stat(self, url: str) -> StoredFile:
        """Return size and etag."""

    def write(self, url: str, data: Buffer | bytes, *, exclusive: bool = False) -> StoredFile:
        """Write a small file in one go."""

    def remove(self, url: str, *, is_once: bool = False) -> None:
        """Delete a file, with one request or with as many as it takes."""

    def read_now(self, url: str) -> bytes:
        """Return a small file's content as it is at this moment."""

    def find_time(self, url: str) -> datetime:
        """Return when a file was written; raises NotImplementedError where the store does not tell."""


class WeakLeases:
    """Best effort: it looks first and writes then, so that two processes that do so at the same moment both succeed.

    Within one process, and so in memory://, it is exact.
    """

    def __init__(self, storage: UnconditionalStore) -> None:
        self._storage = storage
        self.is_weak = storage.sharing is not Sharing.THREADS

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
        with EXCLUSIVE:
            try:
                etag = self._storage.stat(url).etag
                return self._storage.read_now(url), etag, self._age(url)
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
            written = self._storage.find_time(url)
            if self._storage.sharing is Sharing.THREADS:
                return (datetime.now(UTC) - written).total_seconds()
            probe = f"{url}.{secrets.token_hex(8)}"
            self._storage.write(probe, b"-")
            try:
                return (self._storage.find_time(probe) - written).total_seconds()
            finally:
                with suppress(OSError):
                    self._storage.remove(probe)
        except NotImplementedError:
            return 0.0
