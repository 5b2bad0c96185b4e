"""What was written to a branch on the Hub and is not published yet, kept on this machine until it is."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.hub.api import HubPath, find_endpoint
from raymerge.pipeline.stores.local.storage import LocalStorage
from raymerge.pipeline.stores.local.writer import output_error
from raymerge.pipeline.stores.seam import Lock, Writer


@dataclass(frozen=True, slots=True)
class StagedFile:
    """A change to one file."""

    path: str
    """In the repository."""
    mode: Literal["lfs", "regular", "delete"]
    nbytes: int
    etag: str
    """What the Hub will say: sha256 of an LFS file, git's id of a regular one; empty where it is deleted."""


class Stage:
    """The changes to one branch; shared by all processes of this machine that write to it.

    LFS files have been uploaded, and only their hashes are here; the content of regular files is.
    """

    def __init__(self, place: HubPath) -> None:
        names = f"{place.repo.replace('/', '--')}--{place.revision.replace('/', '-')}"
        digest = hashlib.sha256("\n".join([find_endpoint(), place.repo, place.revision]).encode()).hexdigest()
        state = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
        self.directory = Path(state, "raymerge", "hub", f"{names}-{digest[:16]}").expanduser().absolute()
        self._local = LocalStorage()

    def journal_path(self, path: str) -> str:
        """Return where a file lies that is about the output and not in it: its journal, its lock."""
        return str(self.directory / "journal" / path)

    def open_journal(self, url: str, path: str, nbytes: int, *, exclusive: bool) -> Writer:
        """Begin such a file, under its URL on the Hub."""
        return _JournalWriter(url, self._local.open_writer(self.journal_path(path), nbytes, exclusive=exclusive))

    @contextmanager
    def lock(self, url: str, path: str) -> Iterator[Lock]:
        """Hold a lock on such a file.

        Raises:
            HeldError: another run holds it.
        """
        lock = self._local.lock(self.journal_path(path))
        try:
            held = lock.__enter__()
        except OutputError as error:
            here, there = Path(self.journal_path(path)).parent, url.rpartition("/")[0]
            raise type(error)(str(error).replace(str(here), there)) from None
        try:
            yield held
        finally:
            lock.__exit__(None, None, None)

    @property
    def is_begun(self) -> bool:
        """Whether there is something to go on with: changes, or a journal."""
        names = self._local.list(str(self.directory / "journal"))
        return any(self.read_all()) or any(name.endswith(".json") for name in names)

    @property
    def parent(self) -> str | None:
        """The commit that the changes are to; None where that was never noted."""
        try:
            return (self.directory / "parent").read_text()
        except FileNotFoundError:
            return None

    def set_parent(self, commit: str) -> None:
        """Note the commit that the changes are to."""
        self._write(self.directory / "parent", commit.encode())

    def find(self, path: str) -> StagedFile | None:
        """Return the change to a file, if there is one."""
        return _read_entry(self._entry_path(path))

    def read_all(self) -> dict[str, StagedFile]:
        """Return all changes, by path in the repository."""
        directory = self.directory / "changes"
        entries = map(_read_entry, sorted(directory.glob("*.json")))
        return {entry.path: entry for entry in entries if entry is not None}

    def content_path(self, file: StagedFile) -> Path:
        """Return where the content of a regular file lies."""
        return self._entry_path(file.path).with_suffix(f".{file.etag}.content")

    def put(self, file: StagedFile, content: bytes | None = None, *, exclusive: bool = False) -> None:
        """Note a change, in place of an earlier one to the same file.

        Raises:
            FileExistsError: it is exclusive, and there is a file already.
            OutputError: the disk is full, or the directory cannot be written to.
        """
        with self._locked():
            earlier = self.find(file.path)
            if exclusive and earlier is not None and earlier.mode != "delete":
                raise FileExistsError(file.path)
            if content is not None:
                self._write(self.content_path(file), content)
            self._write(self._entry_path(file.path), json.dumps(asdict(file)).encode())
            if earlier is not None and earlier.etag != file.etag:
                self.content_path(earlier).unlink(missing_ok=True)

    def remove(self, paths: Iterable[str]) -> None:
        """Forget the changes to some files."""
        with self._locked():
            for path in paths:
                entry = self.find(path)
                self._entry_path(path).unlink(missing_ok=True)
                if entry is not None:
                    self.content_path(entry).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all changes, and the journal; only for who holds the lock."""
        self.remove(self.read_all())
        for name in self._local.list(str(self.directory / "journal")):
            if name.endswith(".json"):
                self._local.delete(self.journal_path(name))

    def forget(self) -> None:
        """Delete what is left where nothing is begun; only for who holds the lock."""
        for name in ("parent", "changes.lock"):
            (self.directory / name).unlink(missing_ok=True)
        with suppress(OSError):
            (self.directory / "changes").rmdir()

    def tidy(self) -> None:
        """Remove directories that the lock has left empty; who takes it now makes them again."""
        journals = [Path(directory) for directory, _, _ in os.walk(self.directory / "journal", topdown=False)]
        for directory in (*journals, self.directory):
            with suppress(OSError):
                directory.rmdir()

    def _entry_path(self, path: str) -> Path:
        return self.directory / "changes" / f"{hashlib.sha256(path.encode()).hexdigest()}.json"

    def _write(self, path: Path, content: bytes) -> None:
        self._local.write(str(path), content)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.directory / "changes.lock"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise output_error(error, path, "cannot be created") from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class _JournalWriter(Writer):
    """A local file under its name on the Hub."""

    def __init__(self, url: str, writer: Writer) -> None:
        self._url = url
        self._writer = writer

    def write(self, data: Buffer | bytes) -> None:
        self._writer.write(data)

    def commit(self) -> StoredFile:
        return replace(self._writer.commit(), url=self._url)

    def abort(self) -> None:
        self._writer.abort()


def git_oid(content: bytes) -> str:
    """Return git's id of a file.

    >>> git_oid(b"hello")
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()


def _read_entry(path: Path) -> StagedFile | None:
    """Return a change; None where there is none, or a damaged one: the file is made again."""
    with suppress(FileNotFoundError, ValueError, TypeError):
        return StagedFile(**json.loads(path.read_bytes()))
    return None
