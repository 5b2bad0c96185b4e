"""One S3 object being uploaded in parts, through s3fs."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fsspec.asyn import sync
from s3fs.core import S3File

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer
from raymerge.pipeline.stores.fsspec.errors import is_changed
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.fsspec.loop import WRITE_SECONDS
from raymerge.pipeline.stores.fsspec.writer import FsspecWriter


class PartsFile(S3File):  # type: ignore[misc]
    """An s3fs file whose requests are tried again one by one: what it was given is not asked for twice."""

    def __init__(
        self,
        patiently: Callable[[str, Callable[[], Any]], Any],
        filesystem: Any,
        path: str,
        mode: str,
        part_nbytes: int,
    ) -> None:
        self._patiently = patiently
        super().__init__(filesystem, path, mode, block_size=part_nbytes, autocommit=False)

    def _call_s3(self, method: str, *kwarglist: Any, **kwargs: Any) -> Any:
        def request() -> Any:
            call = self.fs._call_s3, method, self.s3_additional_kwargs, *kwarglist
            try:
                return sync(self.fs.loop, *call, timeout=WRITE_SECONDS, **kwargs)
            except OSError as error:
                if "IfNoneMatch" in kwargs and is_changed(error):
                    raise FileExistsError(f"{self.path}: there is an object of this name") from None
                raise

        return self._patiently(method, request)


class PartsWriter(FsspecWriter):
    """Uploads a file in parts, one after the other."""

    def __init__(self, storage: FsspecFiles, url: str, nbytes: int, file: PartsFile) -> None:
        super().__init__(storage, url, nbytes)
        self._file = file

    def _append(self, data: Buffer) -> None:
        while data:  # it sends all that it has at once
            piece = data[: self._file.blocksize - self._file.buffer.tell()]
            self._file.write(piece)
            data = data[piece.nbytes :]

    def _finish(self) -> None:
        self._file.close()  # sends what is left
        try:
            self._file.commit()
        except (OutputError, FileExistsError):
            if not self._is_complete():
                raise

    def _discard(self) -> None:
        self._file.closed = True  # it would begin an upload when it is thrown away
        self._file.discard()

    def _is_complete(self) -> bool:
        """Tell whether the parts have become the object, and only the answer was lost."""
        parts = self._file.parts
        digest = hashlib.md5(b"".join(bytes.fromhex(part["ETag"].strip('"')) for part in parts), usedforsecurity=False)
        with suppress(OSError):
            return self.storage.stat(self.url).etag == f"{digest.hexdigest()}-{len(parts)}"
        return False
