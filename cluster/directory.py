"""Directories that a run needs for a while, such as for its sockets, and what is left of those of killed runs."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PARENT = Path("/tmp")
"""Short: sockets are in the directory, whose names have at most 107 bytes."""

_PREFIX = "raymerge-"

_LOCK = "lock"
"""Held by the run for as long as it lives; the processes that it starts do not inherit it."""


@contextmanager
def make_directory(parent: Path | None = None) -> Iterator[Path]:
    """Make a directory that is deleted at the end; delete first those of runs that were killed.

    Args:
        parent: in which it is made; /tmp by default.

    Raises:
        OSError: the parent cannot be written to.
    """
    parent = parent or _PARENT
    _sweep(parent)
    owner = os.getpid()
    directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
    lock = os.open(directory / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "new").rename(directory / _LOCK)  # under this name it is held from the first moment
        yield directory
    finally:
        if os.getpid() == owner:  # a forked process has this context too, and may drop it
            shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _sweep(parent: Path) -> None:
    """Delete this user's directories that no run holds."""
    for lock in parent.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # another user's, or gone, or held
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
