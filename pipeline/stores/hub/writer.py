"""One file on its way to the Hub: to a local file that has no name, then to the Hub or to the pending changes."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
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
"""Where a file without a name has one, for this process; elsewhere a killed run leaves the file behind."""


class HubWriter(Writer):
    """Writes a file that is on the branch once the branch's changes are published.

    Shards are uploaded at once, other files with the commit. The bytes wait on the local disk, as the Hub wants to know
    their hash first.
    """

    def __init__(
        self,
        url: str,
        place: HubPath,
        nbytes: int,
        api: HubApi,
        pending: PendingChanges,
        is_there: Callable[[], bool] | None,
    ) -> None:
        """Begin.

        Args:
            url: as the caller has it.
            place: what it means.
            nbytes: announced.
            api: of the Hub.
            pending: changes to the branch.
            is_there: tells whether the branch has the file already, for a file that must not replace one.
        """
        self._url = url
        self._place = place
        self._nbytes = nbytes
        self._api = api
        self._pending = pending
        self._is_there = is_there
        self._num_written = 0
        self._spool: IO[bytes]
        self._directory = tempfile.gettempdir()
        free = shutil.disk_usage(self._directory).free
        if free < nbytes:
            raise self._no_room(f"{nbytes:,} bytes are needed, {free:,} are free")
        try:
            if _OPEN_FILES.exists():
                self._spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                self._spool_path = str(_OPEN_FILES / str(self._spool.fileno()))
            else:
                self._spool = tempfile.NamedTemporaryFile(buffering=0, prefix="raymerge-")  # noqa: SIM115
                self._spool_path = self._spool.name
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        view = memoryview(data).cast("B")
        if self._num_written + view.nbytes > self._nbytes:
            given = self._num_written + view.nbytes
            raise OutputError(f"{self._url}: {given:,} bytes given, {self._nbytes:,} were announced")
        try:
            while view:
                count = self._spool.write(view)
                self._num_written += count
                view = view[count:]
        except OSError as error:
            self.abort()
            raise self._no_room(str(error.strerror)) from error

    def commit(self, sha256: str | None = None) -> StoredFile:  # noqa: D102
        try:
            if self._num_written != self._nbytes:
                raise OutputError(f"{self._url}: {self._num_written:,} bytes given, {self._nbytes:,} were announced")
            if self._is_there is not None and self._is_there():
                raise FileExistsError(self._url)
            if sha256 is None:
                with Path(self._spool_path).open("rb") as spool:
                    sha256 = hashlib.file_digest(spool, "sha256").hexdigest()
            file = self._send(sha256)
        except (RefusalError, BrokenError) as error:
            raise OutputError(
                f"{self._api.explain(error, self._place)}; finished shards are kept: run the same command again"
            ) from None
        finally:
            self._spool.close()
        return StoredFile(self._url, self._nbytes, file.etag)

    def abort(self) -> None:  # noqa: D102
        self._spool.close()

    def _send(self, sha256: str) -> PendingFile:
        """Upload a shard, or keep the content of another file; note the change."""
        path, is_exclusive = self._place.path, self._is_there is not None
        if path.endswith(".safetensors") and self._nbytes:
            addition = CommitOperationAdd(path, self._spool_path)
            addition.upload_info.sha256 = bytes.fromhex(sha256)
            self._api.upload(self._place, addition)
            if addition._is_uploaded:
                file = PendingFile(path, "uploaded", self._nbytes, sha256)
                self._pending.put(file, exclusive=is_exclusive)
                return file
        with self._open_content() as content:
            file = PendingFile(path, "kept", self._nbytes, sha256, git_oid(content))
            self._pending.put(file, content, exclusive=is_exclusive)
        return file

    @contextmanager
    def _open_content(self) -> Iterator[Buffer]:
        if not self._nbytes:
            yield memoryview(b"")
            return
        with mmap(self._spool.fileno(), 0, access=ACCESS_READ) as mapped, memoryview(mapped) as content:
            yield content

    def _no_room(self, why: str) -> OutputError:
        return OutputError(
            f"{self._url}: a file for the Hub waits in {self._directory} until it is uploaded, and that cannot be"
            f" written: {why}; free space there, set TMPDIR to another directory, or choose a smaller --shard-size"
        )
