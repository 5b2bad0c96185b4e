"""A store of one object, for leases."""

from __future__ import annotations

import threading

from raymerge.pipeline.errors import FetchError

URL = "store://bucket/out/.raymerge/lock"


class Objects:
    """A store of one object in this process, whose clock is set by hand and whose answers may get lost."""

    def __init__(self) -> None:
        self.is_weak = False
        self.now = 1_000_000.0
        self.is_down = False
        self.num_lost = 0
        self.content: tuple[bytes, str, float] | None = None
        self.num_writes = 0
        self._guard = threading.Lock()

    def create(self, url: str, data: bytes) -> str | None:
        return self._write(data, None)

    def replace(self, url: str, data: bytes, etag: str) -> str | None:
        return self._write(data, etag)

    def read_with_age(self, url: str) -> tuple[bytes, str, float] | None:
        self._check()
        return None if self.content is None else (*self.content[:2], self.now - self.content[2])

    def delete_if(self, url: str, etag: str) -> None:
        self._check()
        if self.content is not None and self.content[1] == etag:
            self.content = None

    def _write(self, data: bytes, expected: str | None) -> str | None:
        self._check()
        with self._guard:
            if (self.content[1] if self.content else None) != expected:
                return None
            self.num_writes += 1
            etag = f"etag {self.num_writes}"
            self.content = (data, etag, self.now)
            if self.num_lost:  # the next try finds the condition no longer true
                self.num_lost -= 1
                return None
            return etag

    def _check(self) -> None:
        if self.is_down:
            raise FetchError("the store is down")
