"""Files of this machine: positioned reads into the caller's buffers, and files that appear whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import stat as stat_mode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

from raymerge.cluster.home import expand_home
from raymerge.pipeline.errors import ConfigError, FetchError, HeldError, OutputError
from raymerge.pipeline.stores.files import Buffer, ByteRange, ByteRows, StoredFile
from raymerge.pipeline.stores.local.open_files import OpenFiles, check_status
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.local.writer import LocalWriter, file_etag, is_at, make_parents, output_error
from raymerge.pipeline.stores.ranges import coalesce
from raymerge.pipeline.stores.seam import Lock, Storage, Writer

_MAX_FILES = 50_000
"""In one directory and below it: whoever gives `/` or `~` for a model is not to wait for a list of the whole disk."""
_MAX_CALL_NBYTES = 2**30
_MAX_CALL_BUFFERS = 1024
_MAX_LOCK_TRIES = 1000
_ADVISED_NBYTES = 2**19
"""Bytes that the kernel is advised of at once: of a larger range it may read only the device's `read_ahead_kb`."""


class LocalStorage(Storage):
    """Local disk, or what is mounted as one."""

    def __init__(self) -> None:
        self._files = OpenFiles()

    def absolute(self, url: str) -> str:  # noqa: D102
        return str(expand_home(local_path(url)).absolute())

    def resolve(self, url: str) -> str:  # noqa: D102
        try:
            return str(local_path(url).resolve())
        except RuntimeError:
            raise ConfigError(f"{url}: a link that leads to itself; choose another directory") from None

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        try:
            status = local_path(url).stat()
        except NotADirectoryError as error:
            raise FileNotFoundError(error.errno, "no such file", url) from error
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise FileNotFoundError(error.errno, "a link to itself", url) from error
            raise FetchError(f"{url}: {error.strerror}") from error
        if not stat_mode.S_ISREG(status.st_mode):
            raise FileNotFoundError(f"{url}: not a file")
        return StoredFile(url, status.st_size, file_etag(status))

    def list(self, url: str) -> Mapping[str, StoredFile]:
        """Return the files below a directory; links to files count, links to directories are not followed.

        Directories below that may not be read or entered, such as the lost+found of a volume, count as empty, and so
        do links in them into such directories. A link in the directory itself may be a model's file: it is refused.
        """
        root = local_path(url)
        if len(root.absolute().parts) == 1:
            raise FetchError(f"{url}: all files of this machine, and no model; give the directory of one")

        def refuse_unreadable(error: OSError) -> None:
            is_below = error.filename != str(root)
            if isinstance(error, FileNotFoundError | NotADirectoryError) or (
                is_below and isinstance(error, PermissionError)
            ):
                return
            raise FetchError(f"{error.filename}: cannot be listed: {error.strerror}") from error

        found = {}
        for directory, _, names in os.walk(root, onerror=refuse_unreadable):
            for path in (Path(directory, name) for name in names):
                name = path.relative_to(root).as_posix()
                try:
                    found[name] = self.stat(f"{url}/{name}")
                except FileNotFoundError:  # deleted just now, or no file
                    continue
                except FetchError as error:
                    if Path(directory) == root or not isinstance(error.__cause__, PermissionError):
                        raise
                if len(found) > _MAX_FILES:
                    raise FetchError(
                        f"{url}: more than {_MAX_FILES:,} files, which are no model; give the directory of one"
                    )
        return dict(sorted(found.items()))

    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0) -> None:
        """Fill each buffer with its range; gaps are skipped, for calls cost less than bytes here."""
        views = [buffer.cast("B") for buffer in buffers]
        for item, view in zip(ranges, views, strict=True):
            if view.nbytes != item.nbytes:
                raise ValueError(f"a buffer of {view.nbytes} bytes for a range of {item.nbytes}")
        for group in coalesce(ranges, max_nbytes=_MAX_CALL_NBYTES):
            with self._files.opened(group.file) as descriptor:
                run: list[Buffer] = []
                start = stop = group.start
                for member in group.members:
                    if ranges[member].start != stop or len(run) == _MAX_CALL_BUFFERS:
                        _read_run(descriptor, group.file, start, run)
                        run, start = [], ranges[member].start
                    run.append(views[member])
                    stop = ranges[member].stop
                _read_run(descriptor, group.file, start, run)
                check_status(group.file, os.fstat(descriptor))

    def read_rows(self, rows: ByteRows, buffer: Buffer) -> None:
        """Fill a buffer with rows, one after the other; neighbours in both are read together.

        Raises:
            FetchError: a row could not be read whole, or the file is no longer the one that was planned with.
        """
        file, nbytes = rows.file, rows.row_nbytes
        if buffer.nbytes != len(rows.starts) * nbytes:
            raise ValueError(f"a buffer of {buffer.nbytes} bytes for {len(rows.starts)} rows of {nbytes}")
        with self._files.opened(file) as descriptor:
            place = 0
            for start, count in zip(*rows.list_runs(), strict=True):
                stop = place + count * nbytes
                run = buffer[place:stop]
                try:
                    is_read = os.preadv(descriptor, (run,), start) == run.nbytes
                except OSError:
                    is_read = False
                if not is_read:  # hardly ever
                    _read_run(descriptor, file, start, [run])
                place = stop
            check_status(file, os.fstat(descriptor))

    def will_read(self, ranges: Sequence[ByteRange]) -> None:
        """Have the kernel read ahead into the page cache, where it can be told to."""
        if not hasattr(os, "posix_fadvise"):
            return
        for group in coalesce(ranges, max_nbytes=_MAX_CALL_NBYTES):
            with suppress(OSError), self._files.opened(group.file) as descriptor:
                for start in range(group.start, group.stop, _ADVISED_NBYTES):
                    nbytes = min(_ADVISED_NBYTES, group.stop - start)
                    os.posix_fadvise(descriptor, start, nbytes, os.POSIX_FADV_WILLNEED)

    def check_unchanged(self, file: StoredFile) -> None:  # noqa: D102
        try:
            status = local_path(file.url).stat()
        except OSError as error:
            raise FetchError(f"{file.url}: was there when the plan was made: {error.strerror}") from error
        check_status(file, status)

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        path = local_path(url)
        partial = local_path(partial_url) if partial_url else path.with_name(f".{path.name}.partial")
        return LocalWriter(url, path, partial, nbytes, exclusive=exclusive)

    def check_space(self, url: str, nbytes: int) -> None:
        """Compare with what is free in the directory, or in the one that it will be made in."""
        path = local_path(url).absolute()
        if path.is_file():
            raise OutputError(f"{url} is a file; choose a directory")
        try:
            directory = next(parent for parent in (path, *path.parents) if parent.is_dir())
            status = os.statvfs(directory)
        except OSError:
            return  # whoever writes there is told
        free_nbytes = (status.f_bavail if os.geteuid() else status.f_bfree) * status.f_frsize
        if status.f_blocks and free_nbytes < nbytes:  # some file systems do not say
            raise OutputError(
                f"{path}: {nbytes:,} bytes are still to be written, {free_nbytes:,} are free in {directory};"
                " free space there, or choose another directory"
            )

    def delete(self, url: str) -> None:
        """Delete a file; a hidden directory goes with its last file."""
        path = local_path(url)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise output_error(error, path, "cannot be deleted") from error
        _remove_if_spent(path.parent)

    @contextmanager
    def lock(self, url: str, *, restart: bool = False) -> Iterator[Lock]:
        """Hold an advisory lock on a file, which says who holds it and is gone afterwards."""
        path = local_path(url)
        descriptor = _lock(path)
        try:
            yield Lock()
        finally:
            if is_at(path, descriptor):
                path.unlink(missing_ok=True)
            os.close(descriptor)
            _remove_if_spent(path.parent)

    def close(self) -> None:  # noqa: D102
        self._files.close()


def _read_run(descriptor: int, file: StoredFile, start: int, buffers: Sequence[Buffer]) -> None:
    """Fill buffers one after the other with the bytes from `start`."""
    todo = [buffer for buffer in buffers if buffer.nbytes]
    stop = start + sum(buffer.nbytes for buffer in todo)
    offset = start
    while todo:
        try:
            got = os.preadv(descriptor, todo, offset)
        except OSError as error:
            where = f"bytes {offset:,} to {stop:,} of {file.nbytes:,}"
            raise FetchError(f"{file.url}: {where} could not be read: {error.strerror}") from error
        if not got:
            raise FetchError(
                f"{file.url}: bytes {start:,} to {stop:,} were expected, the file ends at {offset:,};"
                " it was cut short while it was read"
            )
        offset += got
        while todo and got >= todo[0].nbytes:
            got -= todo.pop(0).nbytes
        if got:
            todo[0] = todo[0][got:]


def _lock(path: Path) -> int:
    """Return a descriptor that holds the lock, on the file that is there now and not on one just deleted."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    for _ in range(_MAX_LOCK_TRIES):
        try:
            make_parents(path)
        except OSError as error:
            raise output_error(error, path, "cannot be created") from error
        try:
            descriptor = os.open(path, flags, 0o666)
        except FileNotFoundError:  # another run has just deleted the directory
            continue
        except OSError as error:
            if error.errno == errno.ELOOP:
                raise OutputError(f"{path}: a link, and a lock is needed there; delete the link") from error
            raise output_error(error, path, "cannot be created") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if is_at(path, descriptor):
                since = datetime.now(UTC).astimezone().isoformat(sep=" ", timespec="seconds")
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"pid {os.getpid()}, since {since}".encode(), 0)
                return descriptor
            os.close(descriptor)
        except BlockingIOError as error:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace")
            os.close(descriptor)
            raise HeldError(
                f"another raymerge run ({holder or 'just started'}) is writing to"
                f" {str(path.parent).removesuffix('/.raymerge')}; wait for it to end, or choose another directory"
            ) from error
        except OSError as error:
            os.close(descriptor)
            raise output_error(error, path, "cannot be locked") from error
    raise OutputError(
        f"{path}: deleted each of the {_MAX_LOCK_TRIES:,} times that it was made;"
        " wait until nobody else writes there, or choose another directory"
    )


def _remove_if_spent(directory: Path) -> None:
    if directory.name.startswith("."):
        with suppress(OSError):
            directory.rmdir()
