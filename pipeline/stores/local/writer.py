"""One local file being written: reserved whole, past the page cache where it can be, renamed when it is durable."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import pwd
import shutil
import stat
from contextlib import suppress
from pathlib import Path
from threading import get_ident

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.seam import Writer

_DIRECT_NBYTES = 2**20
_ALIGNMENT = 4096
_O_DIRECT = getattr(os, "O_DIRECT", 0)

_NEXT_STEP = {
    errno.EROFS: "the file system is read-only: choose another directory",
    errno.ENOTDIR: "a part of the path is a file: choose another directory",
    errno.EEXIST: "a part of the path is a file: choose another directory",
    errno.EISDIR: "a directory has this name: choose another directory",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "the file system or a limit (`ulimit -f`) forbids files of this size: choose a smaller"
    " --shard-size, with --overwrite, as that begins anew",
    errno.EXDEV: "the unfinished file must be on the same file system",
    errno.EIO: "the disk reports an error: choose another one",
}


class LocalWriter(Writer):
    """Writes a file under another name, and gives it its own at the end.

    A file of 1 MiB or more bypasses the page cache where the file system allows it, as long as it comes in whole disk
    blocks from page-aligned memory: a write through the cache costs several times as much CPU.
    """

    def __init__(self, url: str, path: Path, partial: Path, nbytes: int, *, exclusive: bool) -> None:
        self._url = url
        self._path = path
        self._exclusive = exclusive
        # Of two that want to be the first, neither may take the other's unfinished file for its own.
        if exclusive:
            partial = partial.with_name(f"{partial.name}.{os.getpid()}-{get_ident()}")
        elif _is_being_written(partial):  # by a slower worker: it may be first in the end
            partial = partial.with_suffix(".twin.partial")
        self._partial = partial
        self._nbytes = nbytes
        self._num_written = 0
        try:
            make_parents(path)
            make_parents(self._partial)
            self._partial.unlink(missing_ok=True)
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
            self._descriptor = os.open(self._partial, flags, 0o666)
        except OSError as error:
            raise output_error(error, path, "cannot be created", nbytes) from error
        with suppress(OSError):  # some file systems have no locks
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        try:
            _reserve(self._descriptor, nbytes)
        except OSError as error:
            raise self._failed(error) from error
        self._is_direct = nbytes >= _DIRECT_NBYTES and _set_direct(self._descriptor, True)

    def write(self, data: Buffer | bytes) -> None:  # noqa: D102
        todo = memoryview(data).cast("B")
        if self._num_written + todo.nbytes > self._nbytes:
            given = self._num_written + todo.nbytes
            raise OutputError(f"{self._path}: {given:,} bytes given, {self._nbytes:,} were announced")
        try:
            while todo:
                count = self._write_some(todo)
                self._num_written += count
                todo = todo[count:]
        except OSError as error:
            raise self._failed(error) from error

    def commit(self, sha256: str | None = None) -> StoredFile:  # noqa: D102
        if self._num_written != self._nbytes:
            self.abort()
            raise OutputError(f"{self._path}: {self._num_written:,} bytes given, {self._nbytes:,} were announced")
        try:
            os.fsync(self._descriptor)
            if self._exclusive:
                self._path.hardlink_to(self._partial)
                self._partial.unlink()
            elif is_at(self._partial, self._descriptor):
                self._partial.replace(self._path)
            else:
                raise OutputError(f"{self._path}: another worker has begun it again, and goes on with it")
            _sync_directory(self._path.parent)
            file = StoredFile(self._url, self._nbytes, file_etag(os.fstat(self._descriptor)))
        except (FileExistsError, OutputError):
            self.abort()
            raise
        except OSError as error:
            raise self._failed(error) from error
        self._close()
        return file

    def abort(self) -> None:  # noqa: D102
        if self._descriptor < 0:
            return
        with suppress(OSError):
            if is_at(self._partial, self._descriptor):
                self._partial.unlink()
        self._close()

    def _write_some(self, data: Buffer) -> int:
        """Write what one call takes; once a piece is not in whole disk blocks, through the page cache."""
        if self._is_direct:
            whole = data[: data.nbytes // _ALIGNMENT * _ALIGNMENT]
            try:
                if whole:
                    return os.pwrite(self._descriptor, whole, self._num_written)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
            self._is_direct = _set_direct(self._descriptor, False)
        return os.pwrite(self._descriptor, data, self._num_written)

    def _failed(self, error: OSError) -> OutputError:
        """Return the error to raise, and leave nothing behind."""
        failure = output_error(error, self._path, "cannot be written", self._nbytes)
        self.abort()
        return failure

    def _close(self) -> None:
        os.close(self._descriptor)
        self._descriptor = -1


def file_etag(status: os.stat_result) -> str:
    """Return a file's version, which changes with its content."""
    return f"{status.st_mtime_ns:x}-{status.st_size:x}-{status.st_ino:x}"


def make_parents(path: Path) -> None:
    """Make the directories that a file is to be in."""
    path.parent.mkdir(parents=True, exist_ok=True)


def is_at(path: Path, descriptor: int) -> bool:
    """Tell whether an open file is still the one that has this name."""
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _is_being_written(partial: Path) -> bool:
    """Tell whether a process that lives, be it stopped, writes to an unfinished file."""
    try:
        descriptor = os.open(partial, os.O_WRONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False


def output_error(error: OSError, path: Path, what: str, nbytes: int = 0) -> OutputError:
    """Return the message for a failed write: the operation, the reason and the next step."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        directory = next(parent for parent in path.absolute().parents if parent.exists())
        free = shutil.disk_usage(directory).free
        why = f"{error.strerror}: it needs {nbytes:,} bytes, {free:,} are free in {directory}"
        return OutputError(
            f"{path}: {what}: {why}; free space and run the same command again: finished shards are kept"
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return OutputError(f"{path}: {what}: {error.strerror}; {_explain_denied(path)}")
    next_step = _NEXT_STEP.get(error.errno or 0)
    return OutputError(f"{path}: {what}: {error.strerror}" + (f"; {next_step}" if next_step else ""))


def _explain_denied(path: Path) -> str:
    """Say whose file or directory may not be written to, and what to do."""
    try:
        there = next(p for p in (path.absolute(), *path.absolute().parents) if os.access(p, os.F_OK))
        status = there.stat()
    except OSError:
        return "choose a directory that you may write to"
    try:
        owner = pwd.getpwuid(status.st_uid).pw_name
    except KeyError:
        owner = f"user {status.st_uid}"
    return (
        f"{there} ({stat.filemode(status.st_mode)}) belongs to {owner}, who can let you write there; or choose another"
        " directory"
    )


def _reserve(descriptor: int, nbytes: int) -> None:
    """Have the file system set aside the bytes, so that a full disk is noticed before any work.

    Free space is compared first: some file systems would fill the disk before they find that it is too small.
    `os.posix_fallocate` would write to every block where the file system cannot reserve.
    """
    status = os.statvfs(descriptor)
    num_free = status.f_bavail if os.geteuid() else status.f_bfree
    if status.f_blocks and num_free * status.f_frsize < nbytes:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    while fallocate and nbytes:
        if not fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(nbytes)):
            return
        number = ctypes.get_errno()
        if number in (errno.EOPNOTSUPP, errno.ENOSYS):
            return
        if number != errno.EINTR:
            raise OSError(number, os.strerror(number))


def _set_direct(descriptor: int, is_direct: bool) -> bool:
    """Switch the page cache off or on, and return whether it is off."""
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
    if is_direct and _O_DIRECT:
        with suppress(OSError):
            fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | _O_DIRECT)
            return True
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags & ~_O_DIRECT)
    return False


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
