"""S3 by s3fs: ranges of an object that has not changed, multipart uploads, and conditional writes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from secrets import token_hex
from typing import Any

import botocore.session
from fsspec.asyn import sync
from s3fs import S3FileSystem

from raymerge.pipeline.errors import FetchError, OutputError
from raymerge.pipeline.stores.abilities import (
    Abilities,
    IgnoredError,
    encryption_parameters,
    find_abilities,
    is_aws,
    may_be_unsupported,
    requester_pays,
)
from raymerge.pipeline.stores.files import StoredFile, check_same
from raymerge.pipeline.stores.fsspec.errors import error_code, find_status, is_changed
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.loop import WRITE_SECONDS, run_bounded
from raymerge.pipeline.stores.fsspec.parts import PartsFile, PartsWriter
from raymerge.pipeline.stores.fsspec.writer import WholeWriter
from raymerge.pipeline.stores.lease import hold_lease
from raymerge.pipeline.stores.remote import CHUNK_NBYTES, NUM_REQUESTS, REQUEST_SECONDS, RemoteStorage
from raymerge.pipeline.stores.retry import FaultLog, one_line, retry
from raymerge.pipeline.stores.seam import Lock, Writer

PART_NBYTES = 8 * 2**20
"""Size of a part; larger where that would make too many parts. Smaller files are put in one piece."""

_MAX_NUM_PARTS = 10_000
_CONNECT_SECONDS = 5
_NO_CHECKSUMS = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}


class S3fsStorage(FsspecFiles):
    """S3, each request with its condition: a file that has changed is not read, and an exclusive one replaces none."""

    read_nbytes = RemoteStorage.read_nbytes
    credentials = "before credentials were looked for"

    def __init__(self, faults: FaultLog) -> None:
        super().__init__("s3", faults)
        self._lock = threading.Lock()
        self._filesystem: Any = None
        self.abilities = Abilities()
        self._is_probed = False
        self._probe_lock = threading.Lock()

    def _is_cut(self, name: str, path: str) -> bool:
        return super()._is_cut(name, path) or "?versionId=" in name

    def _find_filesystem(self, url: str) -> Any:
        return self.filesystem

    @property
    def filesystem(self) -> Any:
        """The one file system for all threads.

        Each request is made once: faults are counted, and tried again after, in one place for all stores.
        """
        with self._lock:
            if self._filesystem is None:
                found = botocore.session.get_session().get_credentials()
                self.credentials = (
                    f"with the AWS credentials found by `{found.method}`"
                    if found
                    else "without AWS credentials, as none were found"
                )
                self._filesystem = S3FileSystem(
                    anon=found is None,
                    skip_instance_cache=True,
                    use_listings_cache=False,
                    requester_pays=requester_pays(),
                    s3_additional_kwargs=encryption_parameters(),
                    config_kwargs={
                        "connect_timeout": _CONNECT_SECONDS,
                        "read_timeout": WRITE_SECONDS,  # what only reads is bounded where it is called
                        "retries": {"total_max_attempts": 1},
                        "max_pool_connections": 4 * NUM_REQUESTS,
                        **({} if self.abilities.has_checksums else _NO_CHECKSUMS),
                    },
                )
                self._filesystem.retries = 1
            return self._filesystem

    def connect(self, url: str) -> None:  # noqa: D102
        run_bounded(self.filesystem, "connect")

    def close(self) -> None:  # noqa: D102
        super().close()
        with self._lock:
            self._filesystem = None  # it closes connections when nobody uses it any more

    # reading

    @contextmanager
    def _open_body(self, file: StoredFile, start: int, stop: int) -> Iterator[Iterator[bytes]]:
        loop = self.filesystem.loop
        answer = self.request("get_object", file.url, Range=f"bytes={start}-{stop - 1}", IfMatch=f'"{file.etag}"')
        body = answer["Body"]
        try:
            check_same(file, int(answer["ContentRange"].rpartition("/")[2]), answer["ETag"].strip('"'))
            yield _read_chunks(loop, body)
        finally:
            loop.call_soon_threadsafe(body.close)

    # writing

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        self._probe(url)
        if nbytes <= PART_NBYTES:
            return WholeWriter(self, url, nbytes, lambda data: self._put_small(url, data, exclusive=exclusive))
        return PartsWriter(self, url, nbytes, self._open_parts(url, nbytes, exclusive=exclusive))

    def _put_small(self, url: str, data: bytes, *, exclusive: bool) -> None:
        """Write an object; where there is one of this content, it is our own and the answer was lost, or as good."""

        def put() -> None:
            if not exclusive:
                self.put(url, data)
            elif self.put(url, data, mode="create") is None and not self._holds(url, data):
                raise FileExistsError(f"{url}: there is an object of this name")

        self.change("PUT", url, put, least_tries=2)

    def _holds(self, url: str, data: bytes) -> bool:
        """Tell whether an object has this content."""
        try:
            file = self.stat(url)
            return file.nbytes == len(data) and self.read(url, len(data)) == data
        except FileNotFoundError:
            return False

    def _open_parts(self, url: str, nbytes: int, *, exclusive: bool) -> PartsFile:
        part_nbytes = max(PART_NBYTES, -(-nbytes // _MAX_NUM_PARTS))
        filesystem, path = self.locate(url)
        if exclusive and not self.abilities.has_conditions:
            if self._find_etag(url) is not None:
                raise FileExistsError(f"{url}: there is an object of this name")
            exclusive = False

        def patiently(operation: str, function: Callable[[], Any]) -> Any:
            return self.change(operation, url, function, least_tries=2)

        return PartsFile(patiently, filesystem, path, "xb" if exclusive else "wb", part_nbytes)

    def put(self, url: str, data: bytes, **conditions: str) -> str | None:
        """Write an object and return its etag; None where a condition does not hold.

        Where the store knows no conditions, it is looked at first.
        """
        filesystem, path = self.locate(url)
        if conditions and not self.abilities.has_conditions:
            if (self._find_etag(url) or "") != conditions.get("IfMatch", "").strip('"'):
                return None
            conditions = {}
        try:
            answer = run_bounded(filesystem, "pipe_file", path, data, seconds=WRITE_SECONDS, **conditions)
        except FileExistsError:
            return None
        except OSError as error:
            if is_changed(error):
                return None
            raise
        return str(answer["ETag"]).strip('"')

    def request(self, method: str, url: str, **parameters: Any) -> Any:
        """Call a method of S3's, once."""
        filesystem, path = self.locate(url)
        bucket, key, _ = filesystem.split_path(path)
        return run_bounded(filesystem, "call_s3", method, Bucket=bucket, Key=key, **parameters)

    def delete_if(self, url: str, etag: str) -> None:
        """Delete an object if it has this etag still: asked first, as not every S3 knows conditions on a DELETE."""
        condition = {"IfMatch": f'"{etag}"'} if self.abilities.has_conditions else {}
        if self.ask("HEAD", url, lambda: self._find_etag(url), is_once=True) == etag:
            self.ask("DELETE", url, lambda: self.request("delete_object", url, **condition), is_once=True)

    def _find_etag(self, url: str) -> str | None:
        filesystem, path = self.locate(url)
        try:
            return str(run_bounded(filesystem, "info", path)["ETag"]).strip('"')
        except FileNotFoundError as error:
            if error_code(error) == "NoSuchBucket":
                raise
            return None

    def _probe(self, url: str) -> None:
        """Find out, once, what the store refuses of writes beside this one, and do without it from then on.

        Raises:
            OutputError: the store refuses any write, or is down.
        """
        with self._probe_lock:
            if self._is_probed:
                return
            if is_aws(self.change("connect", url, self._find_endpoint)):
                self._is_probed = True
                return
            directory = url.rpartition("/")[0].removesuffix("/.raymerge")
            probe = f"{directory}/.raymerge/probe.{token_hex(8)}"
            most = self.abilities

            def attempt(abilities: Abilities) -> None:
                self._use(abilities)

                def write() -> None:
                    if abilities.has_conditions:
                        self.put(probe, b"-", mode="create")
                        if self.put(probe, b"-", mode="create") is not None:
                            raise IgnoredError
                        self.put(probe, b"-", IfMatch=f'"{self._find_etag(probe)}"')
                    else:
                        self.put(probe, b"-")

                retry(
                    write,
                    faults=self.faults,
                    store=self.store_name(url),
                    operation="PUT",
                    classify=self.classify,
                    give_up=lambda error, summary: FetchError(f"{url}: {summary}: {one_line(error)}"),
                    least_tries=2,
                )

            def is_unsupported(error: Exception) -> bool:
                return isinstance(error, IgnoredError) or may_be_unsupported(find_status(error), error_code(error))

            try:
                found = find_abilities(
                    attempt, most=most, is_unsupported=is_unsupported, faults=self.faults, store=self.store_name(url)
                )
            except Exception as error:
                with self._lock:
                    self.abilities, self._filesystem = most, None
                raise OutputError(str(error if isinstance(error, FetchError) else self.explain(error, url))) from None
            self._use(found)
            with suppress(OSError):
                self.remove(probe, is_once=True)
            self._is_probed = True

    def _find_endpoint(self) -> str:
        run_bounded(self.filesystem, "connect")
        return str(self.filesystem.s3.meta.endpoint_url)

    def _use(self, abilities: Abilities) -> None:
        """Make writes with these headers from now on."""
        with self._lock:
            if abilities.has_checksums != self.abilities.has_checksums:
                self._filesystem = None
            self.abilities = abilities

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:
        """Hold a lease on an object."""
        self._probe(url)
        return hold_lease(S3Leases(self), url, self.faults)


class S3Leases:
    """The requests of a lock: S3 has conditional writes."""

    def __init__(self, storage: S3fsStorage) -> None:
        self._storage = storage
        self.is_weak = not storage.abilities.has_conditions

    def create(self, url: str, data: bytes) -> str | None:
        """Write an object unless there is one, and return its etag; None where there is one."""
        return self._storage.change("PUT", url, lambda: self._storage.put(url, data, mode="create"))

    def replace(self, url: str, data: bytes, etag: str) -> str | None:
        """Write an object that has this etag still, and return its new one; None where it has not, or is gone."""

        def put() -> str | None:
            try:
                return self._storage.put(url, data, IfMatch=f'"{etag}"')
            except FileNotFoundError as error:
                if error_code(error) == "NoSuchBucket":
                    raise
                return None

        return self._storage.change("PUT", url, put)

    def read_with_age(self, url: str) -> tuple[bytes, str, float] | None:
        """Return an object's content, etag, and the seconds since it was written by the store's clock; None if gone."""

        def read() -> tuple[bytes, str, float]:
            answer = self._storage.request("get_object", url)
            content = b"".join(_read_chunks(self._storage.filesystem.loop, answer["Body"]))
            date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
            now = parsedate_to_datetime(date) if date else datetime.now(UTC)
            return content, answer["ETag"].strip('"'), (now - answer["LastModified"]).total_seconds()

        try:
            return self._storage.ask("GET", url, read)
        except FileNotFoundError:
            return None

    def delete_if(self, url: str, etag: str) -> None:
        """Delete an object if it has this etag still."""
        self._storage.delete_if(url, etag)


def _read_chunks(loop: Any, body: Any) -> Iterator[bytes]:
    """Yield a body in chunks, up to where it breaks."""
    error: Exception | None = None

    async def read_chunk() -> bytes:
        nonlocal error
        chunk = bytearray()
        try:
            while len(chunk) < CHUNK_NBYTES:
                data = await body.read(CHUNK_NBYTES - len(chunk))
                if not data:
                    break
                chunk += data
        except Exception as caught:
            error = caught
        return bytes(chunk)

    while chunk := sync(loop, read_chunk, timeout=REQUEST_SECONDS):
        yield chunk
    if error is not None:
        raise error
