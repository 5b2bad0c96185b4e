"""Where the bytes of a file on the Hub are: one request for each file, then ranged GETs straight from its storage."""

from __future__ import annotations

import re
from email.message import Message
from threading import Lock as ThreadLock

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.path import parse_hub_url
from raymerge.pipeline.stores.hub.pending import PendingChanges
from raymerge.pipeline.stores.web.reader import changed

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


class HubTarget:
    """Where one file's bytes are, which is asked for once, and again when the answer has expired."""

    def __init__(self, file: StoredFile) -> None:
        self.num_expiries = 0
        """In a row."""
        self._file = file
        self._place = parse_hub_url(file.url)
        self._lock = ThreadLock()
        self._url: str | None = None

    def find(self, api: HubApi) -> str:
        """Return the URL to read from."""
        with self._lock:
            if self._url is None:
                self._url = self._resolve(api)
            return self._url

    def forget(self, url: str) -> int:
        """Note that a URL has expired; return how many have in a row."""
        with self._lock:
            if self._url == url:
                self._url = None
                self.num_expiries += 1
            return self.num_expiries

    def check(self, headers: Message) -> None:
        """Make sure that the Hub itself serves the content that was planned with."""
        etag = _plain(headers.get("ETag"))
        is_comparable = len(etag) == len(self._file.etag) and _HASH.fullmatch(etag) is not None
        if is_comparable and etag != self._file.etag and not self._place.is_pinned:
            raise changed(self._file, None, etag)

    def _resolve(self, api: HubApi) -> str:
        if not self._place.is_pinned and PendingChanges(self._place.root).find(self._place.path) is not None:
            raise FetchError(f"{self._file.url}: uploaded, and cannot be read before it is published")
        found = api.find_content(self._place)
        nbytes = self._file.nbytes if found.size is None else found.size
        if (nbytes, found.etag) != (self._file.nbytes, self._file.etag):
            raise changed(self._file, nbytes, found.etag)
        return found.location


def _plain(etag: str | None) -> str:
    return (etag or "").strip().removeprefix("W/").strip('"')
