"""Changes to a branch of the Hub that are not published yet, kept on this machine until they are."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from raymerge.cluster.home import find_state, is_writable
from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer
from raymerge.pipeline.stores.hub.path import HubPath, find_endpoint
from raymerge.pipeline.stores.local.storage import LocalStorage
from raymerge.pipeline.stores.local.writer import output_error
from raymerge.pipeline.stores.seam import Lock

_PARENT, _UNDERWAY, _LOCK = "parent", "underway.json", "changes.lock"


@dataclass(frozen=True, slots=True)
class PendingFile:
    """A change to one file."""

    path: str
    """In the repository."""
    mode: Literal["uploaded", "kept", "delete"]
    """Its content is at the Hub already, or here, or it is to have none."""
    nbytes: int = 0
    sha256: str = ""
    """The Hub's identity of an LFS file."""
    git_oid: str = ""
    """The Hub's identity of a regular file, in case that a kept file becomes one."""

    @property
    def etag(self) -> str:
        """Identity of the content until it is published."""
        return self.git_oid or self.sha256

    def is_in(self, tree: Mapping[str, tuple[int, str]]) -> bool:
        """Tell whether a tree, of sizes and etags, is as it is after this change."""
        found = tree.get(self.path)
        if self.mode == "delete" or found is None:
            return self.mode == "delete" and found is None
        return found in ((self.nbytes, self.sha256), (self.nbytes, self.git_oid))


class PendingChanges:
    """The changes to one branch; shared by all processes of this machine that write to it.

    Shards have been uploaded, and only their hashes are here; the content of all other files is.
    """

    def __init__(self, place: HubPath) -> None:
        names = f"{place.repo.replace('/', '--')}--{place.revision.replace('/', '-')}"
        digest = hashlib.sha256("\n".join([find_endpoint(), place.repo, place.revision]).encode()).hexdigest()
        self.directory = find_state() / "hub" / f"{names}-{digest[:16]}"
        self._local = LocalStorage()

    def check_place(self) -> None:
        """Make sure that changes can be kept.

        Raises:
            OutputError: saying which directory cannot be written to.
        """
        if not is_writable(self.directory):
            raise OutputError(
                f"{self.directory}: cannot be written to, and what is not published yet is kept there;"
                " set XDG_STATE_HOME to a directory that you may write to"
            )

    def journal_path(self, path: str) -> str:
        """Return where a file lies that is about the output and not in it: its journal, its lock."""
        return str(self.directory / "journal" / path)

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
            here, there = str(self.directory / "journal"), url.removesuffix(f"/{path}")
            raise type(error)(str(error).replace(here, there)) from None
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
            return (self.directory / _PARENT).read_text()
        except FileNotFoundError:
            return None

    def set_parent(self, commit: str) -> None:
        """Note the commit that the changes are to."""
        self._write(self.directory / _PARENT, commit.encode())

    def find(self, path: str) -> PendingFile | None:
        """Return the change to a file, if there is one."""
        return _read_entry(self._entry_path(path))

    def read_all(self) -> dict[str, PendingFile]:
        """Return all changes, by path in the repository."""
        directory = self.directory / "changes"
        entries = [entry for entry in map(_read_entry, directory.glob("*.json")) if entry is not None]
        return {entry.path: entry for entry in sorted(entries, key=lambda entry: entry.path)}

    def content_path(self, file: PendingFile) -> Path:
        """Return where the content of a kept file lies."""
        return self._entry_path(file.path).with_suffix(f".{file.etag}.content")

    def put(self, file: PendingFile, content: Buffer | None = None, *, exclusive: bool = False) -> None:
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

    def set_underway(self, changes: Sequence[PendingFile]) -> None:
        """Record the commit that is about to be made."""
        self._write(self.directory / _UNDERWAY, json.dumps([asdict(change) for change in changes]).encode())

    def read_underway(self) -> list[PendingFile]:
        """Return the files of the last recorded commit; none where there is no record."""
        with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
            return list(decode(parse_json((self.directory / _UNDERWAY).read_bytes()), tuple[PendingFile, ...]))
        return []

    def settle(self, commit: str, changes: Iterable[PendingFile]) -> None:
        """Note that a commit has these changes; what is left is a change to it."""
        self.set_parent(commit)
        self.remove(change.path for change in changes if self.find(change.path) == change)
        (self.directory / _UNDERWAY).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget all changes, and the journal; only for who holds the lock."""
        self.remove(self.read_all())
        for name in self._local.list(str(self.directory / "journal")):
            if name.endswith(".json"):
                self._local.delete(self.journal_path(name))

    def forget(self) -> None:
        """Delete what is left where nothing is begun; only for who holds the lock."""
        for name in (_PARENT, _UNDERWAY, _LOCK):
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

    def _write(self, path: Path, content: Buffer | bytes) -> None:
        self._local.write(str(path), content)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        path = self.directory / _LOCK
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


def git_oid(content: Buffer | bytes) -> str:
    """Return git's id of a file.

    >>> git_oid(b"hello")
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    digest = hashlib.sha1(b"blob %d\0" % len(content), usedforsecurity=False)
    digest.update(content)
    return digest.hexdigest()


def _read_entry(path: Path) -> PendingFile | None:
    """Return a change; None where there is none, or a damaged one: the file is made again."""
    with suppress(FileNotFoundError, ValueError, TypeError, KeyError):
        entry: PendingFile = decode(parse_json(path.read_bytes()), PendingFile)
        return entry
    return None
