"""Buckets of the Hub: files that appear one by one and are replaced in place, as in an object store; sent by Xet."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import BucketFile

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.files import StoredFile, check_same
from raymerge.pipeline.stores.hub.api import LOG_IN, check_listed, is_missing
from raymerge.pipeline.stores.hub.files import XET_NBYTES, HubFiles
from raymerge.pipeline.stores.hub.path import find_endpoint, is_offline
from raymerge.pipeline.stores.hub.session import quiet
from raymerge.pipeline.stores.hub.writer import SpoolWriter
from raymerge.pipeline.stores.lease import hold_lease
from raymerge.pipeline.stores.retry import FaultLog, one_line
from raymerge.pipeline.stores.seam import Lock, Writer
from raymerge.pipeline.stores.weak_lease import EXCLUSIVE, WeakLeases
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError

T = TypeVar("T")

_URL = re.compile(r"hf://buckets/(?P<bucket>\w[\w.-]*/\w[\w.-]*)(?:/(?P<path>.*?))?/*", re.ASCII | re.DOTALL)


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in a bucket: `hf://buckets/org/name[/path]`."""

    bucket: str
    path: str

    @property
    def url(self) -> str:
        return f"hf://buckets/{self.bucket}" + (f"/{self.path}" if self.path else "")


def _parse(url: str) -> _Place:
    match = _URL.fullmatch(url)
    if match is None or "@" in url.split("/")[4]:
        raise ConfigError(f"{url}: write it as hf://buckets/org/name/directory; buckets have no revisions")
    return _Place(match["bucket"], match["path"] or "")


class BucketStorage(HubFiles):
    """Buckets of the Hub, which have no conditional writes: a lock is a matter of good timing."""

    write_nbytes = XET_NBYTES

    def __init__(self, faults: FaultLog, *, private: bool) -> None:
        """Begin.

        Args:
            faults: where what goes wrong is noted.
            private: whether buckets that are made are private.
        """
        super().__init__(faults)
        self._private = private

    def absolute(self, url: str) -> str:  # noqa: D102
        return _parse(url).url

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        return _stored_file(url, self._find(url))

    def list(self, url: str) -> Mapping[str, StoredFile]:  # noqa: D102
        place = _parse(url)
        prefix = f"{place.path}/" if place.path else ""

        def collect() -> list[BucketFile]:
            entries = self.api.hub.list_bucket_tree(place.bucket, prefix or None, recursive=True)
            files = [_checked(entry) for entry in entries if isinstance(entry, BucketFile)]
            return [file for file in files if file.path.startswith(prefix)]

        try:
            found = self._ask("list", url, collect)
        except FileNotFoundError:
            return {}
        files = {file.path.removeprefix(prefix): file for file in found}
        return {name: _stored_file(f"{place.url}/{name}", file) for name, file in sorted(files.items())}

    def check_unchanged(self, file: StoredFile) -> None:  # noqa: D102
        try:
            found = self.stat(file.url)
        except FileNotFoundError:
            raise FetchError(f"{file.url}: was there when the plan was made, and is gone") from None
        check_same(file, found.nbytes, found.etag)

    def locate(self, file: StoredFile) -> str:  # noqa: D102
        url = _content_url(_parse(file.url))
        found = self._ask("HEAD", file.url, lambda: self.api.hub.get_hf_file_metadata(url=url))
        etag = found.xet_file_data.file_hash if found.xet_file_data else file.etag
        check_same(file, file.nbytes if found.size is None else found.size, etag)
        return found.location

    def read_now(self, url: str) -> bytes:
        """Return a small file's content as it is at this moment."""
        target = _content_url(_parse(url))

        def read() -> bytes:
            try:
                return self._client.ask("GET", target, self.api.headers(target), redirects=True).content
            except RefusalError as error:
                raise FileNotFoundError(f"{url}: no such file") from None if is_missing(error) else error

        return self.call("GET", url, read)

    def find_time(self, url: str) -> datetime:
        """Return when a file was written, by the Hub's clock."""
        time = self._find(url).uploaded_at
        if time is None:
            raise NotImplementedError
        return time

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        def is_there() -> bool:
            with suppress(FileNotFoundError):
                self._find(url)
                return True
            return False

        return _BucketWriter(self, url, nbytes, is_there if exclusive else None)

    def delete(self, url: str) -> None:  # noqa: D102
        self.remove(url)

    def remove(self, url: str, *, is_once: bool = False) -> None:
        """Delete a file, if there is one."""
        place = _parse(url)
        try:
            self._find(url)
            self._ask("delete", url, lambda: self.api.hub.batch_bucket_files(place.bucket, delete=[place.path]))
        except FileNotFoundError:
            return
        except FetchError as error:
            raise OutputError(str(error)) from None

    @contextmanager
    def lock(self, url: str, *, restart: bool = False) -> Iterator[Lock]:
        """Make sure that the bucket is there, and hold a lease on a file in it."""
        place = _parse(url)
        if not is_offline() and not self.api.has_token():
            raise OutputError(f"{url}: only who is logged in can write to {find_endpoint()}: {LOG_IN}")

        def create() -> None:
            self.api.hub.create_bucket(place.bucket, private=self._private, exist_ok=True)

        self._change("create", url, create)
        with hold_lease(WeakLeases(self), url, self.faults) as lease:
            yield lease

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        hint = f"; check what the token may do, or {LOG_IN}" if isinstance(error, RefusalError) else ""
        return FetchError(f"{url}: {find_endpoint()}: {one_line(error)}{hint}")

    def _find(self, url: str) -> BucketFile:
        """Return the Hub's metadata of a file.

        Raises:
            FileNotFoundError: there is no such file, or no such bucket.
        """
        place = _parse(url)

        def look() -> list[BucketFile]:
            return [_checked(file) for file in self.api.hub.get_bucket_paths_info(place.bucket, [place.path])]

        found = self._ask("stat", url, look)
        if not found:
            raise FileNotFoundError(f"{url}: no such file")
        return found[0]

    def _ask(self, operation: str, url: str, function: Callable[[], T]) -> T:
        """Ask the Hub about a bucket.

        Raises:
            FileNotFoundError: there is no such bucket, as far as one may know.
            FetchError: the Hub refuses or is down.
        """
        try:
            return self.api.ask(operation, function)
        except (RefusalError, BrokenError) as error:
            if isinstance(error, RefusalError) and is_missing(error):
                raise FileNotFoundError(f"{url}: no such bucket") from None
            raise self.explain(error, url) from None

    def _change(self, operation: str, url: str, function: Callable[[], T]) -> T:
        """Ask the Hub to change a bucket; raises OutputError where it does not."""
        try:
            return self._ask(operation, url, function)
        except (FetchError, FileNotFoundError) as error:
            raise OutputError(str(error)) from None


class _BucketWriter(SpoolWriter):
    """Writes a file that is in the bucket as soon as it is sent."""

    def __init__(self, storage: BucketStorage, url: str, nbytes: int, is_there: Callable[[], bool] | None) -> None:
        super().__init__(url, nbytes, storage.api, is_there)
        self._storage = storage

    def commit(self, sha256: str | None = None) -> StoredFile:
        with EXCLUSIVE if self.is_exclusive else nullcontext():
            return super().commit(sha256)

    def send(self, sha256: str | None) -> str:
        place, hub = _parse(self.url), self.api.hub

        def add() -> None:
            with quiet():
                hub.batch_bucket_files(place.bucket, add=[(self.spool_path, place.path)])

        self.api.ask("upload", add)
        return self._storage.stat(self.url).etag

    def explain(self, error: Exception) -> str:
        return str(self._storage.explain(error, self.url))


def _content_url(place: _Place) -> str:
    return f"{find_endpoint()}/buckets/{place.bucket}/resolve/{quote(place.path, safe='')}"


def _checked(file: BucketFile) -> BucketFile:
    """Return the metadata of a file if its types are those of a Hub; raises TypeError where they are not."""
    check_listed(file.path, file.size, file.xet_hash)
    return file


def _stored_file(url: str, file: BucketFile) -> StoredFile:
    return StoredFile(url, file.size, file.xet_hash)
