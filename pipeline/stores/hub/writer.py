"""One file on its way to the Hub: to a local file that has no name, hashed on the way, then sent, then staged."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from base64 import b64encode
from collections.abc import Callable
from urllib.parse import quote

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.hub.api import HubApi, HubPath
from raymerge.pipeline.stores.hub.lfs import upload_lfs
from raymerge.pipeline.stores.hub.stage import Stage, StagedFile, git_oid
from raymerge.pipeline.stores.seam import Writer
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError

_SAMPLE_NBYTES = 512


class HubWriter(Writer):
    """Writes a file that is on the branch once the branch's changes are published.

    LFS wants the hash before the bytes, so the bytes wait on the local disk.
    """

    def __init__(
        self, url: str, place: HubPath, nbytes: int, api: HubApi, stage: Stage, is_there: Callable[[], bool] | None
    ) -> None:
        """Begin.

        Args:
            url: as the caller has it.
            place: what it means.
            nbytes: announced.
            api: of the Hub.
            stage: of the branch.
            is_there: tells whether the branch has the file already, for a file that must not replace one.
        """
        self._url = url
        self._place = place
        self._nbytes = nbytes
        self._api = api
        self._stage = stage
        self._is_there = is_there
        self._num_written = 0
        self._digest = hashlib.sha256()
        self._directory = tempfile.gettempdir()
        free = shutil.disk_usage(self._directory).free
        if free < nbytes:
            raise self._no_room(f"{nbytes:,} bytes are needed, {free:,} are free")
        try:
            self._spool = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
        except OSError as error:
            raise self._no_room(str(error.strerror)) from error

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        view = memoryview(data).cast("B")
        if self._num_written + view.nbytes > self._nbytes:
            given = self._num_written + view.nbytes
            raise OutputError(f"{self._url}: {given:,} bytes given, {self._nbytes:,} were announced")
        self._digest.update(view)
        try:
            while view:
                count = self._spool.write(view)
                self._num_written += count
                view = view[count:]
        except OSError as error:
            self.abort()
            raise self._no_room(str(error.strerror)) from error

    def commit(self) -> StoredFile:  # noqa: D102
        try:
            if self._num_written != self._nbytes:
                raise OutputError(f"{self._url}: {self._num_written:,} bytes given, {self._nbytes:,} were announced")
            if self._is_there is not None and self._is_there():
                raise FileExistsError(self._url)
            staged, content = self._send()
            self._stage.put(staged, content, exclusive=self._is_there is not None)
        except (RefusalError, BrokenError) as error:
            raise OutputError(
                f"{self._api.explain(error, self._place)}; finished shards are kept: run the same command again"
            ) from None
        finally:
            self._spool.close()
        return StoredFile(self._url, self._nbytes, staged.etag)

    def abort(self) -> None:  # noqa: D102
        self._spool.close()

    def _send(self) -> tuple[StagedFile, bytes | None]:
        """Upload what is large; return what to stage, and the content of what is not."""
        if self._is_lfs():
            oid = self._digest.hexdigest()
            upload_lfs(self._api, self._place, oid, self._nbytes, self._spool.fileno())
            return StagedFile(self._place.path, "lfs", self._nbytes, oid), None
        content = os.pread(self._spool.fileno(), self._nbytes, 0)
        return StagedFile(self._place.path, "regular", self._nbytes, git_oid(content)), content

    def _is_lfs(self) -> bool:
        """Ask the Hub, whose rules these are, where it is not clear."""
        if not self._nbytes or self._place.path.endswith(".safetensors"):
            return self._nbytes > 0
        sample = b64encode(os.pread(self._spool.fileno(), _SAMPLE_NBYTES, 0)).decode()
        answer = self._api.post(
            f"/api/models/{self._place.repo}/preupload/{quote(self._place.revision, safe='')}",
            {"files": [{"path": self._place.path, "sample": sample, "size": self._nbytes}]},
        )
        return bool(answer["files"][0]["uploadMode"] == "lfs")

    def _no_room(self, why: str) -> OutputError:
        return OutputError(
            f"{self._url}: a file for the Hub waits in {self._directory} until it is uploaded, and that cannot be"
            f" written: {why}; free space there, set TMPDIR to another directory, or choose a smaller --shard-size"
        )
