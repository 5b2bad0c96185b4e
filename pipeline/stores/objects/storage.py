"""Files in S3, Google Cloud Storage and Azure Blob Storage, through obstore."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from datetime import datetime
from secrets import token_hex
from threading import BoundedSemaphore
from threading import Lock as ThreadLock
from typing import TYPE_CHECKING

import obstore

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import StoredFile, check_same
from raymerge.pipeline.stores.lease import hold_lease
from raymerge.pipeline.stores.objects.aws import AwsAccount
from raymerge.pipeline.stores.objects.bucket import Bucket
from raymerge.pipeline.stores.objects.errors import ObjectError, classify_fault, translated
from raymerge.pipeline.stores.objects.reader import DirectReader
from raymerge.pipeline.stores.objects.writer import (
    NUM_BUFFERS,
    PART_NBYTES,
    ObjectWriter,
    quoted,
    stored_file,
    unquoted,
)
from raymerge.pipeline.stores.remote import CHUNK_NBYTES, Body, ChunkBody, RemoteStorage
from raymerge.pipeline.stores.retry import Fault, FaultLog, Patience, one_line
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES, Lock, Writer
from raymerge.pipeline.urls import scheme_of, split_url

if TYPE_CHECKING:
    from obstore import GetOptions, ObjectMeta, PutMode

_LIST_CHUNK = 1000
_NUM_BODIES = 16
"""Bodies that obstore reads at once."""
_BODY_NBYTES = 3 * 2**19
"""Held by each: buffers of its body, and the allocator's arena of its thread. Measured: 1 to 1.5 MiB."""
_LEAVING_SECONDS = 5.0
_UNUSABLE = re.compile(r"//|^/|[\x00-\x1f\x7f]")


class ObjectStorage(RemoteStorage):
    """The buckets of one kind of store; each is reached when it is needed first.

    obstore reads where signed URLs do not.
    """

    write_nbytes = NUM_BUFFERS * PART_NBYTES - 2 * OUTPUT_BUFFER_NBYTES
    library_nbytes = 16 * 2**20  # measured besides: 8 to 12 MiB for its threads, TLS and connections

    def __init__(self, scheme: str, faults: FaultLog, pool: BufferPool) -> None:
        super().__init__(faults)
        self._scheme = scheme
        self._pool = pool
        self._lock = ThreadLock()
        self._bodies = BoundedSemaphore(_NUM_BODIES)
        self._buckets: dict[str, Bucket] = {}
        self._aws: AwsAccount | None = None
        self._direct: DirectReader | None = None

    def absolute(self, url: str) -> str:  # noqa: D102
        bucket, key = split_url(url)
        return f"{self._scheme}://{bucket}/{key}".rstrip("/")

    def store_name(self, url: str) -> str:  # noqa: D102
        return f"{scheme_of(url)}://{split_url(url)[0]}"

    def classify(self, error: Exception) -> Fault | None:  # noqa: D102
        return classify_fault(error)

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        if isinstance(error, ObjectError):
            return FetchError(self._bucket(split_url(url)[0]).explain(error, url))
        return FetchError(f"{url}: {one_line(error)}")

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        bucket, key = self._locate(url)
        if not key:
            raise FileNotFoundError(errno.ENOENT, "a bucket, not an object", url)

        def head() -> StoredFile:
            with _missing(url), translated("HEAD"):
                return stored_file(url, obstore.head(bucket.reads, key))

        return self.call("HEAD", url, head)

    def list(self, url: str) -> Mapping[str, StoredFile]:
        """Return the files below a directory; empty objects that stand for directories are none."""
        bucket, prefix = self._locate(url)

        def list_all() -> Sequence[ObjectMeta]:
            with translated("list"):
                chunks = obstore.list(bucket.reads, prefix or None, chunk_size=_LIST_CHUNK)
                return [item for chunk in chunks for item in chunk]

        found = {}
        start = f"{prefix}/" if prefix else ""
        listed = self.call("list", url, list_all)
        if not listed:
            bucket.check_is_store()
        for item in listed:
            if not item["path"].startswith(start):
                continue
            name = item["path"].removeprefix(start)
            if name and (item["size"] or self._is_file(f"{url}/{name}")):
                found[name] = stored_file(f"{url}/{name}", item)
        return dict(sorted(found.items()))

    def open_range(self, file: StoredFile, start: int, stop: int) -> AbstractContextManager[Body]:  # noqa: D102
        bucket, key = self._locate(file.url)
        reader = self._direct
        answer = reader.open_range(bucket, key, file, start, stop) if reader else None
        return self._ask_obstore(bucket, key, file, start, stop) if answer is None else answer

    @contextmanager
    def _ask_obstore(self, bucket: Bucket, key: str, file: StoredFile, start: int, stop: int) -> Iterator[Body]:
        self.read_nbytes = _NUM_BODIES * _BODY_NBYTES  # headers are read so, too: a plan knows it
        options: GetOptions = {"range": (start, stop)}
        if file.etag:
            options["if_match"] = quoted(file.etag)
        try:
            with self._bodies, translated("GET"):
                result = obstore.get(bucket.reads, key, options=options)
                found = stored_file(file.url, result.meta)
                check_same(file, found.nbytes, found.etag)
                yield ChunkBody(memoryview(chunk) for chunk in result.stream(CHUNK_NBYTES))
        except ObjectError as error:
            if error.status in (404, 412, 416):
                self.check_unchanged(file)
            raise

    def connect(self, url: str) -> None:  # noqa: D102
        bucket = self._bucket(split_url(url)[0])
        if bucket.aws is not None:
            bucket.aws.client(bucket.region)

    def check_unchanged(self, file: StoredFile) -> None:  # noqa: D102
        try:
            found = self.stat(file.url)
        except FileNotFoundError:
            raise FetchError(f"{file.url}: was there when the plan was made, and is gone") from None
        check_same(file, found.nbytes, found.etag)

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        bucket, key = self._locate_output(url)
        return ObjectWriter(bucket, self._pool, url, key, nbytes, exclusive=exclusive)

    def check_space(self, url: str, nbytes: int) -> None:
        """Make sure that there is such a bucket; how much room it has cannot be known."""
        self._locate_output(url)

    def delete(self, url: str) -> None:  # noqa: D102
        bucket, key = self._locate_output(url)

        def delete() -> None:
            with suppress(FileNotFoundError), _missing(url), translated("DELETE"):
                obstore.delete(bucket.reads, key)

        bucket.write("DELETE", url, delete)

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:  # noqa: D102
        bucket, key = self._locate_output(url)
        bucket.probe(key)
        return hold_lease(_LeaseObject(bucket, key), url, self.faults)

    def close(self) -> None:  # noqa: D102
        super().close()
        with self._lock:
            self._buckets.clear()
            aws, self._aws = self._aws, None
            direct, self._direct = self._direct, None
        if aws is not None:
            aws.close()
        if direct is not None:
            direct.close()

    def _locate(self, url: str) -> tuple[Bucket, str]:
        """Return the bucket and the key that a URL means.

        Raises:
            ConfigError: obstore cannot name this key.
            FetchError: the bucket cannot be used.
        """
        name, key = split_url(url.rstrip("/"))
        if unusable := _UNUSABLE.search(key):
            if unusable[0] in ("//", "/"):
                raise ConfigError(
                    f"{url}: two slashes in a row; leave one out, rename the object, or try --storage fsspec"
                )
            raise ConfigError(f"{url!r}: has the character {unusable[0]!r}; rename the object, or try --storage fsspec")
        bucket = self._bucket(name)
        bucket.connect()
        return bucket, key

    def _locate_output(self, url: str) -> tuple[Bucket, str]:
        try:
            return self._locate(url)
        except FetchError as error:
            raise OutputError(str(error)) from None

    def _bucket(self, name: str) -> Bucket:
        with self._lock:
            if name not in self._buckets:
                if self._scheme == "s3" and self._aws is None:
                    aws = AwsAccount()
                    self._aws, self._direct = aws, DirectReader(aws)
                self._buckets[name] = Bucket(self._scheme, name, self._aws, self.faults)
            return self._buckets[name]

    def _is_file(self, url: str) -> bool:
        """Tell whether an empty object has this name, and not this name and a slash, which obstore does not show."""
        try:
            self.stat(url)
        except FileNotFoundError:
            return False
        return True


class _LeaseObject:
    """The object that a lock is."""

    def __init__(self, bucket: Bucket, key: str) -> None:
        self._bucket = bucket
        self._key = key
        self.is_weak = not bucket.abilities.has_conditions

    def create(self, url: str, data: bytes) -> str | None:
        return self._put(url, data, "create")

    def replace(self, url: str, data: bytes, etag: str) -> str | None:
        return self._put(url, data, {"e_tag": quoted(etag)})

    def read_with_age(self, url: str) -> tuple[bytes, str, float] | None:
        """Ask the store for its time by writing an object beside the lock, for a moment."""
        probe = f"{self._key}.{token_hex(8)}"

        def read() -> tuple[bytes, ObjectMeta]:
            with _missing(url), translated("GET"):
                result = obstore.get(self._bucket.reads, self._key)
                return bytes(result.bytes()), result.meta

        def ask_time() -> datetime:
            with translated("PUT"):
                obstore.put(self._bucket.reads, probe, b"")
                return obstore.head(self._bucket.reads, probe)["last_modified"]

        try:
            data, meta = self._bucket.write("GET", url, read)
        except FileNotFoundError:
            return None
        now = self._bucket.write("PUT", f"{url}.*", ask_time)
        with suppress(ObjectError), translated("DELETE"):
            obstore.delete(self._bucket.reads, probe)
        return data, stored_file(url, meta).etag, (now - meta["last_modified"]).total_seconds()

    def delete_if(self, url: str, etag: str) -> None:
        """Look, then delete: nobody may take the lock in between, as it has been renewed lately."""
        patience = Patience(self._bucket.faults, self._bucket.url, "DELETE", _LEAVING_SECONDS)
        while True:
            try:
                with translated("DELETE"):
                    if stored_file(url, obstore.head(self._bucket.reads, self._key)).etag == etag:
                        obstore.delete(self._bucket.reads, self._key)
                return
            except ObjectError as error:
                fault = classify_fault(error)
                if fault is None or not patience.failed(fault):
                    return

    def _put(self, url: str, data: bytes, mode: PutMode) -> str | None:
        def put() -> str | None:
            try:
                return unquoted(self._bucket.put(self._bucket.reads, self._key, data, mode))
            except ObjectError as error:
                if error.status in (404, 409, 412) and not error.as_fault():
                    return None
                raise

        return self._bucket.write("PUT", url, put)


@contextmanager
def _missing(url: str) -> Iterator[None]:
    try:
        yield
    except ObjectError as error:
        if error.status == 404 and error.code not in ("NoSuchBucket", "ContainerNotFound"):
            raise FileNotFoundError(errno.ENOENT, "no such object", url) from None
        raise
