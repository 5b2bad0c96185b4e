"""Storages by URL: opened for one merge, with its settings, and closed at its end."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from threading import Lock as ThreadLock

from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.inline import INLINE_URL, InlineStorage
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Storage
from raymerge.pipeline.stores.settings import DEFAULTS, StoreSettings
from raymerge.pipeline.urls import check_url, scheme_of, split_url

COPY_NBYTES = 4 * 2**20
"""Bytes of a file in memory while all of it is read."""


class Stores:
    """The storages of one merge, with the buffers and the record of faults that they share.

    Safe to use from several threads. Pickled as its settings and the stores that are known to work: a worker process
    has storages of its own.
    """

    def __init__(self, settings: StoreSettings = DEFAULTS, reached: Iterable[str] = ()) -> None:
        self.settings = settings
        self.faults = FaultLog(reached)
        """Faults that this process has recovered from."""
        self.pool = BufferPool()
        """It holds at most what the plan gives to the workers that run at once in this process."""
        self._lock = ThreadLock()
        self._storages: dict[str, Storage] = {}
        self._inline = InlineStorage()
        self._known: dict[str, Storage] = {INLINE_URL: self._inline}

    def __reduce__(self) -> tuple[type[Stores], tuple[StoreSettings, tuple[str, ...]]]:
        return Stores, (self.settings, self.faults.reached)

    def at(self, url: str) -> Storage:
        """Return the storage that serves a path or URL; one for each kind of store, so that connections are shared.

        Raises:
            ConfigError: the URL is malformed, or its scheme is not known.
        """
        if known := self._known.get(url):
            return known
        check_url(url)
        scheme = scheme_of(url)
        if scheme == "hf" and split_url(url)[0] == "buckets":
            scheme = "bucket"
        with self._lock:
            if scheme not in self._storages:
                self._storages[scheme] = self._build(scheme)
            storage = self._known[url] = self._storages[scheme]
            return storage

    def put(self, directory: str, name: str, content: bytes) -> StoredFile:
        """Return a small file that is kept in memory as long as these stores are, below a URL that no store serves."""
        file = self._inline.add(directory, name, content)
        self._known[directory] = self._known[file.url] = self._inline
        return file

    def read_ranges(self, ranges: Sequence[ByteRange]) -> tuple[bytes, ...]:
        """Return the content of some small ranges, in their order; those of one storage are read together.

        Raises:
            FetchError: a file could not be read, or has changed.
        """
        by_storage: dict[Storage, dict[ByteRange, bytes]] = {}
        for piece in ranges:
            by_storage.setdefault(self.at(piece.file.url), {})[piece] = b""
        found: dict[ByteRange, bytes] = {}
        for storage, pieces in by_storage.items():
            found.update(zip(pieces, storage.read_ranges(list(pieces)), strict=True))
        return tuple(found[piece] for piece in ranges)

    def read_pieces(self, file: StoredFile) -> Iterator[Buffer]:
        """Yield a file's bytes in order; each piece is valid until the next is asked for.

        Raises:
            FetchError: the file could not be read, or has changed.
        """
        storage = self.at(file.url)
        with self.pool.lend(COPY_NBYTES, 1) as (buffer,):
            for start in range(0, file.nbytes, COPY_NBYTES):
                piece = ByteRange(file, start, min(start + COPY_NBYTES, file.nbytes))
                storage.read_into([piece], [buffer[: piece.nbytes]])
                yield buffer[: piece.nbytes]

    def close(self) -> None:
        """Close files and connections, and free the buffers; the stores can still be used, and open them again."""
        for storage in list(self._storages.values()):
            storage.close()
        self.pool.close()

    def _build(self, scheme: str) -> Storage:
        """Import what a scheme needs, and nothing else."""
        if scheme == "file":
            from raymerge.pipeline.stores.local.storage import LocalStorage

            return LocalStorage()
        if scheme == "hf":
            from raymerge.pipeline.stores.hub.storage import HubStorage

            return HubStorage(self.faults, private=self.settings.private)
        if scheme == "bucket":
            from raymerge.pipeline.stores.hub.bucket import BucketStorage

            return BucketStorage(self.faults, private=self.settings.private)
        if self.settings.library == "auto" and scheme in ("s3", "gs", "az"):
            from raymerge.pipeline.stores.objects.storage import ObjectStorage

            return ObjectStorage(scheme, self.faults, self.pool)
        if self.settings.library == "auto" and scheme in ("http", "https"):
            from raymerge.pipeline.stores.web.storage import WebStorage

            return WebStorage(self.faults)
        if scheme == "s3":
            from raymerge.pipeline.stores.fsspec.s3 import S3fsStorage

            return S3fsStorage(self.faults)
        from raymerge.pipeline.stores.fsspec.storage import FsspecStorage

        return FsspecStorage(scheme, self.faults)


@contextmanager
def open_stores(settings: StoreSettings = DEFAULTS) -> Iterator[Stores]:
    """Have storages with these settings until the context ends."""
    stores = Stores(settings)
    try:
        yield stores
    finally:
        stores.close()
