"""Files whose bytes the Hub tells where to read: one request for each, then ranged GETs straight from its storage."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from threading import Lock as ThreadLock

from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.path import find_endpoint
from raymerge.pipeline.stores.remote import RemoteStorage
from raymerge.pipeline.stores.retry import Fault, FaultLog
from raymerge.pipeline.stores.web import reader as web_reader
from raymerge.pipeline.stores.web.client import Answer, WebClient, origin_of
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web

XET_NBYTES = 400 * 2**20
"""Memory of hf_xet while it uploads a file, however large: measured up to 380 MiB for 0.1 to 1 GB."""

_MAX_EXPIRIES = 5
"""In a row, of the signed URLs of one file."""


@dataclass(slots=True)
class _Target:
    """The place of one file's bytes."""

    lock: ThreadLock = field(default_factory=ThreadLock)
    url: str | None = None
    """None until the Hub is asked, and again when the URL has expired."""
    num_expiries: int = 0
    """In a row."""


class HubFiles(RemoteStorage):
    """Reads files of the Hub; a subclass knows where they are."""

    def __init__(self, faults: FaultLog) -> None:
        super().__init__(faults)
        self.api = HubApi(faults)
        self._client = WebClient()
        self._guard = ThreadLock()
        self._targets: dict[StoredFile, _Target] = {}

    @abstractmethod
    def locate(self, file: StoredFile) -> str:
        """Return the URL to read a file from.

        Raises:
            FetchError: it has changed since the plan was made.
        """

    def open_range(self, file: StoredFile, start: int, stop: int) -> Answer:  # noqa: D102
        with self._guard:
            target = self._targets.setdefault(file, _Target())
        with target.lock:
            url = target.url = target.url or self.locate(file)
        try:
            answer = web_reader.open_range(self._client, url, self.api.headers(url), file, start, stop)
        except RefusalError as error:
            if error.status not in (401, 403) or origin_of(url) == origin_of(find_endpoint()):
                raise
            with target.lock:
                if target.url == url:
                    target.url = None
                    target.num_expiries += 1
            if target.num_expiries > _MAX_EXPIRIES:
                raise
            raise BrokenError("the signed URL is no longer good", Fault("403 expired URL")) from None
        target.num_expiries = 0
        return answer

    def store_name(self, url: str) -> str:  # noqa: D102
        return find_endpoint()

    def classify(self, error: Exception) -> Fault | None:  # noqa: D102
        return classify_web(error)

    def close(self) -> None:  # noqa: D102
        super().close()
        self._client.close()
        with self._guard:
            self._targets.clear()
