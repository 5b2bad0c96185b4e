"""The directory of a Ray that was started for one run, and what is left of those whose run was killed."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from raymerge.cluster.errors import ClusterConnectError

_PARENT = Path("/tmp")
"""Short: sockets are in the directory, whose names have at most 107 bytes."""

_PREFIX = "raymerge-"

_LOCK = "lock"
"""Held by the run for as long as it lives; the processes that it starts do not inherit it."""


@contextmanager
def make_directory() -> Iterator[Path]:
    """Make a directory for Ray, and delete it at the end; delete first those of runs that were killed.

    Raises:
        ClusterConnectError: /tmp cannot be written to.
    """
    _sweep()
    try:
        directory = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=_PARENT))
        lock = os.open(directory / "new", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ClusterConnectError(
            f"Ray does not start on this machine: it needs a directory in {_PARENT} ({error.strerror}); make {_PARENT}"
            " writable, or leave --ray out to merge without it"
        ) from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        (directory / "new").rename(directory / _LOCK)  # under this name it is held from the first moment
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)


def _sweep() -> None:
    """Delete this user's directories that no run holds."""
    for lock in _PARENT.glob(f"{_PREFIX}*/{_LOCK}"):
        with suppress(OSError):  # another user's, or gone, or held
            descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(descriptor).st_uid == os.getuid():
                    shutil.rmtree(lock.parent, ignore_errors=True)
            finally:
                os.close(descriptor)
