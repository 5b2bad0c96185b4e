"""Files of machine code in the user's cache, with a lock on each while a process makes it."""

from __future__ import annotations

import fcntl
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

_PATIENCE_SECONDS = 120.0
"""Longest wait for another process that compiles the same loop; after that it counts as hung."""
_POLL_SECONDS = 0.01


def find_directory() -> Path | None:
    """Return the directory that loops are kept in; None for a user without a home."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    try:
        directory = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        return None
    return directory / "raymerge" / "loops"


@dataclass(frozen=True, slots=True)
class CodeFile:
    """A file in the cache with the machine code of one loop."""

    path: Path

    def exists(self) -> bool:
        """Tell whether there is a file, sound or not."""
        return self.path.exists()

    def read(self) -> bytes:
        """Return the code; nothing where there is none, it is not whole, or others may have written it."""
        try:
            with self.path.open("rb") as stream:
                status = os.fstat(stream.fileno())
                content = stream.read()
        except OSError:
            return b""
        is_ours = status.st_uid == os.geteuid() and not status.st_mode & 0o022
        checksum, code = content[:32], content[32:]
        return code if is_ours and sha256(code).digest() == checksum else b""

    def write(self, code: bytes) -> None:
        """Keep code where that is possible; where it is not, the next process compiles again."""
        draft = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        with suppress(OSError):
            self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            try:
                draft.touch(mode=0o600)
                draft.write_bytes(sha256(code).digest() + code)
                draft.replace(self.path)
            finally:
                draft.unlink(missing_ok=True)

    def try_lock(self) -> int | None:
        """Return the descriptor of a lock on making this file; None while another process has it.

        It holds for processes that inherit the descriptor, too, until `unlock`, or until all of them have ended.

        Raises:
            OSError: there are no locks here, or no files can be written.
        """
        path = self._lock_path
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.path.samestat(os.fstat(lock), path.stat()):
                    return lock
            except BlockingIOError:
                os.close(lock)
                return None
            except FileNotFoundError:  # deleted by who had it; there may be a new one
                pass
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def unlock(self, lock: int) -> None:
        """Release a lock, whoever else has inherited it."""
        with suppress(OSError):
            self._lock_path.unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_UN)
        os.close(lock)

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Have the lock, after whoever has it now; go on without one where there are none."""
        deadline = time.monotonic() + _PATIENCE_SECONDS
        lock = None
        with suppress(OSError):
            while (lock := self.try_lock()) is None and time.monotonic() < deadline:
                time.sleep(_POLL_SECONDS)
        try:
            yield
        finally:
            if lock is not None:
                self.unlock(lock)

    @property
    def _lock_path(self) -> Path:
        return self.path.with_name(f"{self.path.name}.lock")
