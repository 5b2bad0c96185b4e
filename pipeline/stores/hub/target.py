"""Where the bytes of a file on the Hub are: one request for each file, then ranged GETs straight from its storage."""

from __future__ import annotations

import re
from email.message import Message
from threading import Lock as ThreadLock
from urllib.parse import quote, urljoin

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.hub.api import HubApi, find_endpoint, parse_hub_url, root_of
from raymerge.pipeline.stores.hub.lfs import find_download
from raymerge.pipeline.stores.hub.stage import Stage
from raymerge.pipeline.stores.web.client import origin_of
from raymerge.pipeline.stores.web.reader import changed

_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_MAX_HOPS = 3
"""From the address of a file to one that says where its bytes are."""


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
        place = self._place
        if not place.is_pinned:
            staged = Stage(root_of(place)).find(place.path)
            if staged is not None:
                url = find_download(api, place, staged.etag, staged.nbytes)
                if url is None:
                    raise FetchError(f"{self._file.url}: uploaded, and cannot be read before it is published")
                return url
        url = f"{find_endpoint()}/{place.repo}/resolve/{quote(place.revision, safe='')}/{quote(place.path)}"
        for _ in range(_MAX_HOPS):
            reply = api.ask("HEAD", url, redirects=False)
            etag = _plain(reply.headers.get("X-Linked-ETag") or reply.headers.get("ETag"))
            location = reply.headers.get("Location")
            target = urljoin(url, location) if location else url
            if etag or origin_of(target) != origin_of(url):
                size = reply.headers.get("X-Linked-Size") or ("" if location else reply.headers.get("Content-Length"))
                nbytes = int(size) if size and size.isdigit() else self._file.nbytes
                if (nbytes, etag) != (self._file.nbytes, self._file.etag):
                    raise changed(self._file, nbytes, etag)
                return target
            url = target  # the repository has another name now
        raise FetchError(f"{self._file.url}: redirected more than {_MAX_HOPS} times")


def _plain(etag: str | None) -> str:
    return (etag or "").strip().removeprefix("W/").strip('"')
