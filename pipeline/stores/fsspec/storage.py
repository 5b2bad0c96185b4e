"""Whatever fsspec has a file system for, through what all of these have in common; S3 with its conditions."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from fsspec.registry import get_filesystem_class, known_implementations

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.changes import changed
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.fsspec.errors import (
    classify_error,
    error_code,
    explain_error,
    is_changed,
    is_missing_bucket,
)
from raymerge.pipeline.stores.fsspec.info import is_directory, stored_file
from raymerge.pipeline.stores.fsspec.lease import EXCLUSIVE, FsspecLeases
from raymerge.pipeline.stores.fsspec.loop import run_bounded
from raymerge.pipeline.stores.fsspec.writer import MovedWriter, WholeWriter
from raymerge.pipeline.stores.lease import hold_lease
from raymerge.pipeline.stores.remote import NUM_REQUESTS, PIECE_NBYTES, RemoteStorage
from raymerge.pipeline.stores.retry import Fault, FaultLog
from raymerge.pipeline.stores.seam import Lock, Sharing, Writer
from raymerge.pipeline.urls import split_url

if TYPE_CHECKING:
    from raymerge.pipeline.stores.fsspec.s3 import S3Requests

T = TypeVar("T")

_READ_NBYTES = PIECE_NBYTES // 2
"""Most that is asked for at a time where a body cannot be read as it comes."""

_FLAT = frozenset({"memory", "s3", "gs", "az", "abfs", "http", "https", "oci", "oss", "tos"})
"""Stores in which directories need not be made, and are gone with their last file."""

_LISTING_TELLS_ALL = frozenset({"memory", "s3", "gs"})
"""Where a listing is known to tell of each file what asking for the file does."""

_PACKAGES = {"smbclient": "smbprotocol"}
"""What to install for a module that is named otherwise."""


class FsspecStorage(RemoteStorage):
    """Files of one scheme, by the fsspec file system that is registered for it.

    A file is written under another name and moved to its own, or put there in one piece or in parts where a store makes
    objects appear whole. A change of a file while it is read is noticed when the read is over; S3 checks each request
    itself. An exclusive file and the lock are safe against other processes on S3 only: elsewhere there is a moment
    between looking and writing.
    """

    write_nbytes = 3 * PIECE_NBYTES  # a part that fills up, its copy as bytes, and what is being sent

    def __init__(self, scheme: str, faults: FaultLog) -> None:
        super().__init__(faults)
        self._scheme = scheme
        self._class = _import_class(scheme)
        self._s3: S3Requests | None = None
        if scheme == "s3":
            from raymerge.pipeline.stores.fsspec.s3 import S3Requests

            self._s3 = S3Requests(self)
        else:
            self.read_nbytes = NUM_REQUESTS * 2 * _READ_NBYTES
        if scheme == "memory":
            self.is_remote = False
            self.sharing = Sharing.THREADS
        self._shared: dict[str, Any] = {}
        self._shared_lock = threading.Lock()
        self._own = threading.local()

    # names

    def absolute(self, url: str) -> str:  # noqa: D102
        rest = url.partition("://")[2].rstrip("/")
        if self._scheme == "memory":
            rest = rest.lstrip("/")
        return f"{self._scheme}://{rest}"

    def store_name(self, url: str) -> str:  # noqa: D102
        return f"{self._scheme}://{split_url(url)[0].rpartition('@')[2]}" if self._scheme != "memory" else "memory://"

    def locate(self, url: str) -> tuple[Any, str]:
        """Return the file system of a URL, and its path there.

        File systems that run on fsspec's event loop are shared by all threads; of others each thread has its own, as
        their connections serve one caller at a time.

        Raises:
            FetchError: the name cannot be written in a URL of this scheme.
        """
        path = self._class._strip_protocol(url)
        name = url.rstrip("/").rpartition("/")[2]
        is_cut = path.rpartition("/")[2] != name or (self._s3 is not None and "?versionId=" in name)
        if is_cut and split_url(url)[1]:
            raise FetchError(f"{url}: fsspec takes a part of this name for something else; rename the file")
        if self._s3 is not None:
            return self._s3.filesystem, path
        options = self._class._get_kwargs_from_urls(url)
        key = repr(sorted(options.items()))
        if self._class.async_impl or self._scheme == "memory":
            with self._shared_lock:
                return self._shared.setdefault(key, None) or self._connect(self._shared, key, options), path
        own = self._own.__dict__
        return own.get(key) or self._connect(own, key, options), path

    def _connect(self, known: dict[str, Any], key: str, options: Mapping[str, Any]) -> Any:
        known[key] = filesystem = self._class(**options, skip_instance_cache=True)
        return filesystem

    def close(self) -> None:  # noqa: D102
        super().close()
        with self._shared_lock:
            self._shared = {}
            self._own = threading.local()
        if self._s3 is not None:
            self._s3.close()

    # requests

    def classify(self, error: Exception) -> Fault | None:  # noqa: D102
        return classify_error(error)

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        return FetchError(explain_error(error, url, self._s3.credentials if self._s3 else "with what fsspec finds"))

    def ask(self, operation: str, url: str, function: Callable[[], T], *, is_once: bool = False) -> T:
        """Carry out a request, several times if need be.

        Raises:
            FileNotFoundError: there is no such file.
            FileExistsError: there is one already.
            FetchError: the store refuses or is down.
        """

        def attempt() -> T:
            try:
                return function()
            except Exception as error:
                if classify_error(error) is not None:
                    self._disconnect()
                raise

        try:
            return attempt() if is_once else self.call(operation, url, attempt)
        except (FetchError, FileExistsError):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_missing_bucket(error):
                raise self.explain(error, url) from None
            raise FileNotFoundError(f"{url}: no such file") from None
        except Exception as error:
            raise self.explain(error, url) from None

    def change(self, operation: str, url: str, function: Callable[[], T]) -> T:
        """Carry out a request that writes, several times if need be.

        Raises:
            FileExistsError: there is a file of this name already.
            OutputError: the store refuses or is down.
        """
        try:
            return self.ask(operation, url, function)
        except (FetchError, FileNotFoundError) as error:
            raise OutputError(str(error)) from None

    def _disconnect(self) -> None:
        """Have this thread connect anew: a connection of its own may not survive a fault."""
        self._own.__dict__.clear()

    # what is there

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        def look() -> Mapping[str, Any]:
            filesystem, path = self.locate(url)
            filesystem.invalidate_cache()
            found: Mapping[str, Any] = run_bounded(filesystem, "info", path)
            return found

        info = self.ask("HEAD", url, look)
        if is_directory(info):
            raise FileNotFoundError(f"{url}: not a file")
        return stored_file(url, info)

    def list(self, url: str) -> Mapping[str, StoredFile]:  # noqa: D102
        def look() -> tuple[str, Mapping[str, Mapping[str, Any]]]:
            filesystem, path = self.locate(url)
            filesystem.invalidate_cache()
            return path, filesystem.find(path, detail=True)

        try:
            path, infos = self.ask("LIST", url, look)
        except FileNotFoundError:
            return {}
        top = f"{path.rstrip('/')}/"
        names = {path.removeprefix(top): info for path, info in infos.items() if path.startswith(top)}
        found = {}
        for name, info in sorted(names.items()):
            if name and not name.endswith("/") and not is_directory(info):
                if self._scheme in _LISTING_TELLS_ALL:
                    found[name] = stored_file(f"{url}/{name}", info)
                else:
                    with suppress(FileNotFoundError):  # deleted just now
                        found[name] = self.stat(f"{url}/{name}")
        return found

    def check_unchanged(self, file: StoredFile) -> None:  # noqa: D102
        try:
            found = self.stat(file.url)
        except FileNotFoundError:
            raise FetchError(f"{file.url}: was there when the plan was made, and is gone") from None
        if found != file:
            raise changed(file, f"{found.nbytes:,} bytes, etag {found.etag}")

    # reading

    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer]) -> None:  # noqa: D102
        super().read_into(ranges, buffers)
        if self._s3 is None:
            for file in dict.fromkeys(item.file for item in ranges):
                self.check_unchanged(file)

    @contextmanager
    def open_range(self, file: StoredFile, start: int, stop: int) -> Iterator[Iterator[Buffer | bytes]]:  # noqa: D102
        try:
            if self._s3 is None:
                yield self._read_parts(file, start, stop)
            else:
                with self._s3.open_range(file, start, stop) as (total_nbytes, etag, chunks):
                    if (total_nbytes, etag) != (file.nbytes, file.etag):
                        raise changed(file, f"{total_nbytes:,} bytes, etag {etag}")
                    yield chunks
        except FileNotFoundError as error:
            if is_missing_bucket(error):
                raise
            raise FetchError(f"{file.url}: was there when the plan was made, and is gone") from None
        except FetchError:
            raise
        except Exception as error:
            if classify_error(error) is not None:
                self._disconnect()
            if is_changed(error):
                self.check_unchanged(file)  # knows what is there now
                raise changed(file, f"an answer of {error_code(error)}") from None
            raise

    def _read_parts(self, file: StoredFile, start: int, stop: int) -> Iterator[bytes]:
        filesystem, path = self.locate(file.url)
        for offset in range(start, stop, _READ_NBYTES):
            last = min(offset + _READ_NBYTES, stop)
            data: bytes = run_bounded(filesystem, "cat_file", path, start=offset, end=last)
            yield data
            if len(data) != last - offset:  # told by nothing else
                self.check_unchanged(file)
                return

    # writing

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        if self._s3 is not None:
            return self._s3.open_writer(url, nbytes, exclusive=exclusive)
        if self._scheme == "memory":
            return WholeWriter(self, url, nbytes, lambda data: self._pipe(url, data, exclusive=exclusive))
        if exclusive:
            return WholeWriter(self, url, nbytes, lambda data: self._write_exclusive(url, data))
        directory, _, name = url.rpartition("/")
        return MovedWriter(self, url, partial_url or f"{directory}/.{name}.partial", nbytes)

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

    def make_parents(self, url: str) -> None:
        """Make the directories that a file is to be in, where a store needs that."""
        if self._scheme not in _FLAT:
            filesystem, path = self.locate(url)
            filesystem.makedirs(filesystem._parent(path), exist_ok=True)

    def delete(self, url: str) -> None:
        """Delete a file; a hidden directory goes with its last file."""
        self.remove(url)

    def remove(self, url: str, *, is_once: bool = False) -> None:
        """Delete a file, with one request or with as many as it takes."""

        def remove() -> None:
            filesystem, path = self.locate(url)
            with suppress(FileNotFoundError, NotADirectoryError):
                run_bounded(filesystem, "rm_file", path)
            parent = filesystem._parent(path)
            if self._scheme not in _FLAT and parent.rpartition("/")[2].startswith("."):
                with suppress(Exception):  # there is more in it
                    filesystem.rmdir(parent)

        try:
            self.ask("DELETE", url, remove, is_once=is_once)
        except FetchError as error:
            raise OutputError(str(error)) from None

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:
        """Hold a lease on an object; where the store has no conditional writes, as well as can be."""
        return hold_lease(self._s3 or FsspecLeases(self), url, self.faults)


def _import_class(scheme: str) -> Any:
    try:
        return get_filesystem_class(scheme)
    except ImportError as error:
        missing = getattr(error.__cause__, "name", None) or ""
        module = known_implementations[scheme]["class"].partition(".")[0]
        package = _PACKAGES.get(missing, missing.partition(".")[0]) if module == "fsspec" else module
        reason = f"needs {package}: pip install {package}" if package else f"does not work: {error}"
        option = " with --storage fsspec" if scheme in ("s3", "gs", "az", "http", "https") else ""
        raise ConfigError(f"{scheme}://...{option} {reason}") from error
