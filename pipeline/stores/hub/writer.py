"""One file on its way to the Hub: to a local file that has no name, then to the Hub or to the pending changes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import IO

from huggingface_hub import CommitOperationAdd

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.hub.api import HubApi
from raymerge.pipeline.stores.hub.path import HubPath
from raymerge.pipeline.stores.hub.pending import PendingChanges, PendingFile, git_oid
from raymerge.pipeline.stores.seam import Writer
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError

_OPEN_FILES = Path("/proc/self/fd")
"""Names of this process's files without a name; where there are none, a killed run leaves its file behind."""


class SpoolWriter(Writer):
    """Collects a file on the local disk, as the Hub wants to know its hash before it is sent; a subclass sends it."""

    def __init__(self, url: str, nbytes: int, api: HubApi, is_there: Callable[[], bool] | None) -> None:
        """Begin.

        Args:
            url: as the caller has it.
            nbytes: announced.
            api: of the Hub.
            is_there: tells whether there is a file of this name, for one that must not replace it.
        """
        self.url = url
        self.nbytes = nbytes
        self.api = api
        self.spool: IO[bytes]
        self.is_exclusive = is_there is not None
        self._is_there = is_there
        self._num_written = 0
        self._directory = tempfile.gettempdir()
        free = shutil.disk_usage(self._directory).free
        if free < nbytes:
            raise self._no_room(f"{nbytes:,} bytes are needed, {free:,} are free")
        try:
            if _OPEN_FILES.exists():
                self.spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                self.spool_path = str(_OPEN_FILES / str(self.spool.fileno()))
            else:
                self.spool = tempfile.NamedTemporaryFile(buffering=0, prefix="raymerge-")  # noqa: SIM115
                self.spool_path = self.spool.name
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        view = memoryview(data).cast("B")
        if self._num_written + view.nbytes > self.nbytes:
            given = self._num_written + view.nbytes
            raise OutputError(f"{self.url}: {given:,} bytes given, {self.nbytes:,} were announced")
        try:
            while view:
                count = self.spool.write(view)
                self._num_written += count
                view = view[count:]
        except OSError as error:
            self.abort()
            raise self._no_room(str(error.strerror)) from error

    def commit(self, sha256: str | None = None) -> StoredFile:  # noqa: D102
        try:
            if self._num_written != self.nbytes:
                raise OutputError(f"{self.url}: {self._num_written:,} bytes given, {self.nbytes:,} were announced")
            if self._is_there is not None and self._is_there():
                raise FileExistsError(self.url)
            return StoredFile(self.url, self.nbytes, self.send(sha256))
        except (RefusalError, BrokenError) as error:
            raise OutputError(f"{self.explain(error)}; finished shards are kept: run the same command again") from None
        finally:
            self.spool.close()

    def abort(self) -> None:  # noqa: D102
        self.spool.close()

    @abstractmethod
    def send(self, sha256: str | None) -> str:
        """Send the file, and return its etag."""

    @abstractmethod
    def explain(self, error: Exception) -> str:
        """Return the error for a request that failed for good."""

    def _no_room(self, why: str) -> OutputError:
        return OutputError(
            f"{self.url}: a file for the Hub waits in {self._directory} until it is uploaded, and that cannot be"
            f" written: {why}; free space there, set TMPDIR to another directory, or choose a smaller"
            " --shard-size, with --overwrite, as that begins anew"
        )


class HubWriter(SpoolWriter):
    """Writes a file that is on the branch once the branch's changes are published.

    Shards are uploaded at once, other files with the commit.
    """

    def __init__(
        self, place: HubPath, nbytes: int, api: HubApi, pending: PendingChanges, is_there: Callable[[], bool] | None
    ) -> None:
        super().__init__(place.url, nbytes, api, is_there)
        self._place = place
        self._pending = pending

    def explain(self, error: Exception) -> str:  # noqa: D102
        return self.api.explain(error, self._place)

    def send(self, sha256: str | None) -> str:  # noqa: D102
        if sha256 is None:
            with Path(self.spool_path).open("rb") as spool:
                sha256 = hashlib.file_digest(spool, "sha256").hexdigest()
        path = self._place.path
        if path.endswith(".safetensors") and self.nbytes:
            addition = CommitOperationAdd(path, self.spool_path)
            addition.upload_info.sha256 = bytes.fromhex(sha256)
            self.api.upload(self._place, addition)
            if addition._is_uploaded:
                self._pending.put(PendingFile(path, "uploaded", self.nbytes, sha256), exclusive=self.is_exclusive)
                return sha256
        with self._open_content() as content:
            file = PendingFile(path, "kept", self.nbytes, sha256, git_oid(content))
            self._pending.put(file, content, exclusive=self.is_exclusive)
        return file.git_oid

    @contextmanager
    def _open_content(self) -> Iterator[Buffer]:
        if not self.nbytes:
            yield memoryview(b"")
            return
        with mmap(self.spool.fileno(), 0, access=ACCESS_READ) as mapped, memoryview(mapped) as content:
            yield content
