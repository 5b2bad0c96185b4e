"""Files being written through fsspec: put in one piece, or written under another name and moved."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from raymerge.pipeline.errors import CorruptedError, FetchError, OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from raymerge.pipeline.stores.seam import Writer


class FsspecWriter(Writer):
    """Counts what is written, and makes sure at the end that the store has all of it."""

    def __init__(self, storage: FsspecFiles, url: str, nbytes: int) -> None:
        self.storage = storage
        self.url = url
        self.nbytes = nbytes
        self._num_written = 0
        self._is_over = False

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        view = memoryview(data).cast("B")
        given = self._num_written + view.nbytes
        if given > self.nbytes:
            raise OutputError(f"{self.url}: {given:,} bytes given, {self.nbytes:,} were announced")
        self._guard(lambda: self._append(view))
        self._num_written = given

    def commit(self, sha256: str | None = None) -> StoredFile:  # noqa: D102
        if self._num_written != self.nbytes:
            self.abort()
            raise OutputError(f"{self.url}: {self._num_written:,} bytes given, {self.nbytes:,} were announced")
        self._guard(self._finish)
        self._is_over = True
        try:
            file = self.storage.stat(self.url)
        except OSError as error:
            raise OutputError(f"{self.url}: written, but: {error}") from None
        if file.nbytes != self.nbytes:
            with suppress(OSError):
                self.storage.delete(self.url)
            raise CorruptedError(f"{self.url}: {self.nbytes:,} bytes were written, the store has {file.nbytes:,}")
        return file

    def abort(self) -> None:  # noqa: D102
        if not self._is_over:
            self._is_over = True
            with suppress(Exception):  # there is an error already, and this is no better one
                self._discard()

    @abstractmethod
    def _append(self, data: Buffer) -> None:
        """Take bytes over, so that the buffer may be reused."""

    @abstractmethod
    def _finish(self) -> None:
        """Make the file visible.

        Raises:
            FileExistsError: it is exclusive, and there is a file of this name.
        """

    @abstractmethod
    def _discard(self) -> None:
        """Forget what was written."""

    def _guard(self, step: Callable[[], None]) -> None:
        """Take a step; where it fails, leave nothing behind."""
        try:
            step()
        except (OutputError, FileExistsError):
            self.abort()
            raise
        except Exception as error:
            self.abort()
            failure = error if isinstance(error, FetchError) else self.storage.explain(error, self.url)
            raise OutputError(str(failure)) from None
        except BaseException:
            self.abort()
            raise


class WholeWriter(FsspecWriter):
    """Collects a file, and puts it in one piece: for small ones, and for memory."""

    def __init__(self, storage: FsspecFiles, url: str, nbytes: int, put: Callable[[bytes], None]) -> None:
        super().__init__(storage, url, nbytes)
        self._put = put
        self._pieces: list[bytes] = []

    def _append(self, data: Buffer) -> None:
        self._pieces.append(bytes(data))

    def _finish(self) -> None:
        data = b"".join(self._pieces)
        self._pieces.clear()
        self._put(data)

    def _discard(self) -> None:
        self._pieces.clear()


class MovedWriter(FsspecWriter):
    """Writes a file under another name, and moves it to its own."""

    def __init__(self, storage: FsspecFiles, url: str, partial_url: str, nbytes: int) -> None:
        super().__init__(storage, url, nbytes)
        self._partial_url = partial_url
        self._file: Any = None
        self._guard(self._open)

    def _open(self) -> None:
        for url in (self.url, self._partial_url):
            self.storage.make_parents(url)
        filesystem, path = self.storage.locate(self._partial_url)
        self._file = filesystem.open(path, "wb")

    def _append(self, data: Buffer) -> None:
        while data:  # files may take less than they are given
            num_taken = self._file.write(data)
            data = data[data.nbytes if num_taken is None else num_taken :]

    def _finish(self) -> None:
        self._file.close()
        found = self.storage.stat(self._partial_url).nbytes
        if found != self.nbytes:
            raise CorruptedError(f"{self.url}: {self.nbytes:,} bytes were written, the store has {found:,}")
        filesystem, partial = self.storage.locate(self._partial_url)
        _, path = self.storage.locate(self.url)
        _move(filesystem, partial, path)

    def _discard(self) -> None:
        with suppress(Exception):
            if self._file is not None:
                self._file.close()
        self.storage.remove(self._partial_url, is_once=True)


def _move(filesystem: Any, old: str, new: str) -> None:
    """Give a file another name, in place of a file that has it."""
    from fsspec import AbstractFileSystem

    if type(filesystem).mv is AbstractFileSystem.mv:  # it would take the names for patterns
        filesystem.cp_file(old, new)
        filesystem.rm_file(old)
        return
    try:
        filesystem.mv(old, new)
    except OSError:
        if not filesystem.exists(new):
            raise
        if not filesystem.exists(old):  # it was done, and the answer was lost
            return
        filesystem.rm_file(new)  # some servers do not rename over a file
        filesystem.mv(old, new)
