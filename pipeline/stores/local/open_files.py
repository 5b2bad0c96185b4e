"""Files of this machine that are kept open, for they are read from again and again."""

from __future__ import annotations

import errno
import os
import resource
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores.files import StoredFile, check_same
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.local.writer import file_etag

_MAX_OPEN_FILES = 1024
"""Kept open: all files of a merge of hundreds of adapters, each of which every window reads from."""
_OPEN_SHARE = 4
"""Part of the files that a process may have open, by its limit, of which no more are kept: one in so many."""


class _OpenFile:
    """An open file, how many threads are reading it, and whether it is to be closed after the last."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.num_users = 0
        self.is_evicted = False


class OpenFiles:
    """Keeps the files read last open. Each was, when it was opened, the one that was planned with."""

    def __init__(self) -> None:
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        most = limit // _OPEN_SHARE if limit != resource.RLIM_INFINITY else _MAX_OPEN_FILES
        self._max_open = min(_MAX_OPEN_FILES, most)
        self._lock = threading.Lock()
        self._files: OrderedDict[StoredFile, _OpenFile] = OrderedDict()

    @contextmanager
    def opened(self, file: StoredFile) -> Iterator[int]:
        """Lend a descriptor; it stays open at least as long as the context."""
        with self._lock:
            entry = self._files.get(file)
            if entry is None:
                entry = self._files[file] = _OpenFile(self._open(file))
            self._files.move_to_end(file)
            entry.num_users += 1
            while len(self._files) > self._max_open:
                self._evict(next(iter(self._files)))
        try:
            yield entry.descriptor
        finally:
            with self._lock:
                entry.num_users -= 1
                if entry.is_evicted and not entry.num_users:
                    os.close(entry.descriptor)

    def close(self) -> None:
        """Close what nobody is reading, and the rest when they are done."""
        with self._lock:
            for file in list(self._files):
                self._evict(file)

    def _open(self, file: StoredFile) -> int:
        """Return a descriptor; where the process can have no more, close the files that nobody is reading."""
        try:
            descriptor = os.open(local_path(file.url), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            idle = [other for other, entry in self._files.items() if not entry.num_users]
            if error.errno not in (errno.EMFILE, errno.ENFILE) or not idle:
                raise FetchError(f"{file.url}: cannot be opened: {error.strerror}") from error
            for other in idle:
                self._evict(other)
            return self._open(file)
        try:
            check_status(file, os.fstat(descriptor))
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _evict(self, file: StoredFile) -> None:
        entry = self._files.pop(file)
        entry.is_evicted = True
        if not entry.num_users:
            os.close(entry.descriptor)


def check_status(file: StoredFile, status: os.stat_result) -> None:
    """Make sure that a file is the one that was planned with; raises FetchError."""
    check_same(file, status.st_size, file_etag(status))
