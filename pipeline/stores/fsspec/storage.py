"""Any store that fsspec has a file system for."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from datetime import datetime
from secrets import token_hex
from typing import Any

from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.loop import run_bounded
from raymerge.pipeline.stores.fsspec.writer import MovedWriter, WholeWriter
from raymerge.pipeline.stores.lease import hold_lease
from raymerge.pipeline.stores.remote import NUM_REQUESTS, PIECE_NBYTES
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Lock, Sharing, Writer
from raymerge.pipeline.stores.weak_lease import EXCLUSIVE, WeakLeases

_READ_NBYTES = PIECE_NBYTES // 2
"""Most that is asked for at a time: a body cannot be read as it comes."""


class FsspecStorage(FsspecFiles):
    """Files of any scheme but S3.

    A file is written under another name and moved to its own, or put there in one piece where that makes it appear
    whole. A change of a file while it is read is noticed when the read is over. An exclusive file and the lock are not
    safe against other processes: there is a moment between looking and writing.
    """

    read_nbytes = NUM_REQUESTS * 2 * _READ_NBYTES

    def __init__(self, scheme: str, faults: FaultLog) -> None:
        super().__init__(scheme, faults)
        self._is_memory = scheme == "memory"
        if self._is_memory:
            self.is_remote = False
            self.sharing = Sharing.THREADS
            self.library_nbytes = 0
        self._shared: dict[str, Any] = {}
        self._shared_lock = threading.Lock()
        self._own = threading.local()

    def absolute(self, url: str) -> str:  # noqa: D102
        absolute = super().absolute(url)
        return f"memory://{absolute.removeprefix('memory://').lstrip('/')}" if self._is_memory else absolute

    def store_name(self, url: str) -> str:  # noqa: D102
        return "memory://" if self._is_memory else super().store_name(url)

    def close(self) -> None:  # noqa: D102
        super().close()
        with self._shared_lock:
            self._shared = {}
            self._own = threading.local()

    def _find_filesystem(self, url: str) -> Any:
        """Return the file system of a URL.

        File systems that run on fsspec's event loop are shared by all threads; of others each thread has its own, as
        their connections serve one caller at a time.
        """
        options = self._class._get_kwargs_from_urls(url)
        key = repr(sorted(options.items()))
        if self._class.async_impl or self._is_memory:
            with self._shared_lock:
                return self._shared.setdefault(key, None) or self._connect(self._shared, key, options)
        own = self._own.__dict__
        return own.get(key) or self._connect(own, key, options)

    def _connect(self, known: dict[str, Any], key: str, options: Mapping[str, Any]) -> Any:
        known[key] = filesystem = self._class(**options, skip_instance_cache=True)
        return filesystem

    def _disconnect(self) -> None:
        self._own.__dict__.clear()

    # reading

    def read_into(  # noqa: D102
        self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0
    ) -> None:
        super().read_into(ranges, buffers, max_gap=max_gap)
        for file in dict.fromkeys(item.file for item in ranges):
            self.check_unchanged(file)

    def _open_body(self, file: StoredFile, start: int, stop: int) -> AbstractContextManager[Iterator[Buffer | bytes]]:
        return nullcontext(self._read_parts(file, start, stop))

    def _read_parts(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        filesystem, path = self.locate(file.url)
        for offset in range(start, stop, _READ_NBYTES):
            last = min(offset + _READ_NBYTES, stop)
            data: bytes = run_bounded(filesystem, "cat_file", path, start=offset, end=last)
            yield data
            if len(data) != last - offset:  # told by nothing else
                self.check_unchanged(file)
                return

    def read_now(self, url: str) -> bytes:
        """Return a small file's content as it is at this moment."""

        def read() -> bytes:
            filesystem, path = self.locate(url)
            content: bytes = run_bounded(filesystem, "cat_file", path)
            return content

        return self.ask("GET", url, read)

    def find_time(self, url: str) -> datetime:
        """Return when a file was written; raises NotImplementedError where the store does not tell."""
        filesystem, path = self.locate(url)
        time: datetime = filesystem.modified(path)
        return time

    # writing

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        if self._is_memory:
            return WholeWriter(self, url, nbytes, lambda data: self._pipe(url, data, exclusive=exclusive))
        if exclusive:
            return WholeWriter(self, url, nbytes, lambda data: self._write_exclusive(url, data))
        directory, _, name = url.rpartition("/")
        # Two workers may write a shard at a time, and the slower one must not touch the other's unfinished file.
        partial = f"{partial_url.removesuffix('.partial')}.{token_hex(4)}.partial" if partial_url else None
        return MovedWriter(self, url, partial or f"{directory}/.{name}.partial", nbytes)

    def _pipe(self, url: str, data: bytes, *, exclusive: bool) -> None:
        def put() -> None:
            filesystem, path = self.locate(url)
            filesystem.pipe_file(path, data, mode="create" if exclusive else "overwrite")

        with EXCLUSIVE:
            self.change("PUT", url, put)

    def _write_exclusive(self, url: str, data: bytes) -> None:
        with EXCLUSIVE:
            with suppress(FileNotFoundError):
                self.stat(url)
                raise FileExistsError(f"{url}: there is a file of this name")
            self.write(url, data)

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:
        """Hold a lease on a file, as well as can be without conditional writes."""
        return hold_lease(WeakLeases(self), url, self.faults)
