"""Files of an fsspec file system: names, requests that are tried again, what is there, and reading it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, TypeVar

from fsspec.registry import get_filesystem_class, known_implementations

from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile, changed
from raymerge.pipeline.stores.fsspec.errors import (
    classify_error,
    error_code,
    explain_error,
    is_changed,
    is_missing_bucket,
)
from raymerge.pipeline.stores.fsspec.info import is_directory, stored_file
from raymerge.pipeline.stores.fsspec.loop import WRITE_SECONDS, run_bounded
from raymerge.pipeline.stores.remote import ChunkBody, RemoteStorage
from raymerge.pipeline.stores.retry import Fault, FaultLog
from raymerge.pipeline.urls import split_url

T = TypeVar("T")

_FLAT = frozenset({"memory", "s3", "gs", "az", "abfs", "http", "https", "oci", "oss", "tos"})
"""Stores in which directories need not be made, and are gone with their last file."""

_LISTING_TELLS_ALL = frozenset({"memory", "s3", "gs"})
"""Protocols whose listings tell of each file as much as asking for it does."""

_PACKAGES = {"smbclient": "smbprotocol"}
"""Package to install for a module that has another name."""


class FsspecFiles(RemoteStorage):
    """Files of one scheme, by the fsspec file system that is registered for it; a subclass reads, writes and locks."""

    write_nbytes = 24 * 2**20  # a part that fills up, its copy as bytes, and what is being sent
    library_nbytes = 16 * 2**20  # measured with s3fs: 6 to 10 MiB for its event loop, connections and bodies
    credentials = "with what fsspec finds"
    """Credentials that requests are made with, for messages."""

    def __init__(self, scheme: str, faults: FaultLog) -> None:
        super().__init__(faults)
        self._scheme = scheme
        self._class = _import_class(scheme)

    # names

    def absolute(self, url: str) -> str:  # noqa: D102
        return f"{self._scheme}://{url.partition('://')[2].rstrip('/')}"

    def store_name(self, url: str) -> str:  # noqa: D102
        return f"{self._scheme}://{split_url(url)[0].rpartition('@')[2]}"

    def locate(self, url: str) -> tuple[Any, str]:
        """Return the file system of a URL, and its path there.

        Raises:
            FetchError: the name cannot be written in a URL of this scheme.
        """
        path = self._class._strip_protocol(url)
        if self._is_cut(url.rstrip("/").rpartition("/")[2], path) and split_url(url)[1]:
            raise FetchError(f"{url}: fsspec takes a part of this name for something else; rename the file")
        return self._find_filesystem(url), path

    def _is_cut(self, name: str, path: str) -> bool:
        """Tell whether fsspec takes a part of a name for something else."""
        return path.rpartition("/")[2] != name

    def connect(self, url: str) -> None:  # noqa: D102
        self._find_filesystem(url)

    @abstractmethod
    def _find_filesystem(self, url: str) -> Any:
        """Return the file system of a URL, for this thread."""

    def _disconnect(self) -> None:
        """Have this thread connect anew: a connection of its own may not survive a fault."""
        return

    # requests

    def classify(self, error: Exception) -> Fault | None:  # noqa: D102
        return classify_error(error)

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        return FetchError(explain_error(error, url, self.credentials))

    def ask(
        self, operation: str, url: str, function: Callable[[], T], *, is_once: bool = False, least_tries: int = 1
    ) -> T:
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
            return attempt() if is_once else self.call(operation, url, attempt, least_tries=least_tries)
        except (FetchError, FileExistsError):
            raise
        except (FileNotFoundError, NotADirectoryError) as error:
            if is_missing_bucket(error):
                raise self.explain(error, url) from None
            raise FileNotFoundError(f"{url}: no such file") from None
        except Exception as error:
            raise self.explain(error, url) from None

    def change(self, operation: str, url: str, function: Callable[[], T], *, least_tries: int = 1) -> T:
        """Carry out a request that writes, several times if need be.

        Raises:
            FileExistsError: there is a file of this name already.
            OutputError: the store refuses or is down.
        """
        try:
            return self.ask(operation, url, function, least_tries=least_tries)
        except (FetchError, FileNotFoundError) as error:
            raise OutputError(str(error)) from None

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
            return path, run_bounded(filesystem, "find", path, seconds=WRITE_SECONDS, detail=True)

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

    @contextmanager
    def open_range(self, file: StoredFile, start: int, stop: int) -> Iterator[ChunkBody]:  # noqa: D102
        try:
            with self._open_body(file, start, stop) as chunks:
                yield ChunkBody(chunks)
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

    @abstractmethod
    def _open_body(self, file: StoredFile, start: int, stop: int) -> AbstractContextManager[Iterator[Buffer | bytes]]:
        """Ask for bytes [start, stop) of a file; raises whatever the file system does."""

    # writing

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
