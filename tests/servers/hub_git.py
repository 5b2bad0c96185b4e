"""Repos with their history, as the test Hub keeps them; ids are git's own."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from tests.servers.hub_http import Refusal

LFS_PATTERNS = (
    "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx "
    "*.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz "
    "*.wasm *.xz *.zip *.zst *tfevents*"
)
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"
GITATTRIBUTES = "".join(f"{pattern} {LFS_ATTRIBUTES}\n" for pattern in LFS_PATTERNS.split()).encode()
"""What each new model repo starts with."""
REGULAR_MAX_NBYTES = 10 << 20
"""The largest file that is kept without LFS."""


def git_oid(kind: str, content: bytes) -> str:
    """Return the id that git gives an object.

    >>> git_oid("blob", b"hello")
    'b6fc4c620b67d95f953a5c1c1230aaab5db5a1b0'
    """
    return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).hexdigest()


@dataclass(frozen=True)
class Entry:
    """A file of a commit."""

    nbytes: int
    oid: str
    """Id of the git blob: the content itself, or the LFS pointer to it."""
    sha256: str | None = None
    """Id of the LFS object; None for a regular file."""

    @property
    def etag(self) -> str:
        return self.sha256 or self.oid


def make_pointer(sha256: str, nbytes: int) -> bytes:
    """Return what git keeps in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {nbytes}\n".encode()


def make_lfs_entry(sha256: str, nbytes: int) -> Entry:
    """Return the entry of an LFS file."""
    return Entry(nbytes, git_oid("blob", make_pointer(sha256, nbytes)), sha256)


@dataclass(frozen=True)
class Commit:
    """A state of all files, and how it came about."""

    oid: str
    parent: Commit | None
    title: str
    description: str
    author: str
    date: str
    files: Mapping[str, Entry]
    trees: Mapping[str, str]
    """Directory to git's id of its tree; the root is ""."""

    def iter_history(self) -> Iterator[Commit]:
        """Yield this commit and those before it."""
        commit: Commit | None = self
        while commit:
            yield commit
            commit = commit.parent

    def find_last_change(self, path: str) -> Commit:
        """Return the commit that gave a file or directory its present content."""

        def get(commit: Commit) -> object:
            return commit.files.get(path) or commit.trees.get(path)

        found = self
        for commit in self.iter_history():
            if get(commit) != get(self):
                break
            found = commit
        return found


def make_trees(files: Mapping[str, Entry]) -> dict[str, str]:
    """Return git's tree id of each directory."""
    children: dict[str, list[tuple[str, str, str]]] = {"": []}
    for path, entry in files.items():
        folder = _get_parent(path)
        children.setdefault(folder, []).append(("100644", PurePosixPath(path).name, entry.oid))
        while folder:
            folder = _get_parent(folder)
            children.setdefault(folder, [])
    trees: dict[str, str] = {}
    for folder in sorted(children, key=lambda each: each.count("/") + bool(each), reverse=True):
        rows = sorted(children[folder], key=lambda row: row[1] + ("/" if row[0] == "40000" else ""))
        content = b"".join(f"{mode} {name}\0".encode() + bytes.fromhex(oid) for mode, name, oid in rows)
        trees[folder] = git_oid("tree", content)
        if folder:
            children[_get_parent(folder)].append(("40000", PurePosixPath(folder).name, trees[folder]))
    return trees


def _get_parent(path: str) -> str:
    return path.rpartition("/")[0]


def make_commit(parent: Commit | None, files: Mapping[str, Entry], title: str, description: str, author: str) -> Commit:
    """Return a commit of these files."""
    now, trees = datetime.now(UTC), make_trees(files)
    who = f"{author} <{author}@users.noreply> {int(now.timestamp())} +0000"
    # the microseconds keep the ids of two equal commits within one second apart
    text = f"tree {trees['']}\n" + (f"parent {parent.oid}\n" if parent else "")
    text += f"author {who}\ncommitter {who}\nx-microsecond {now.microsecond}\n\n{title}\n\n{description}"
    date = now.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return Commit(git_oid("commit", text.encode()), parent, title, description, author, date, dict(files), trees)


@dataclass
class Repo:
    """A model repo: branches on a graph of commits."""

    id: str
    private: bool = False
    gated: str | bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)
    lfs_objects: dict[str, int] = field(default_factory=dict)
    """SHA-256 to nbytes of what was uploaded to this repo."""

    def get_commit(self, revision: str) -> Commit:
        """Return the commit that a branch or a full commit id names."""
        branch = "main" if revision == "HEAD" else revision.removeprefix("refs/heads/")
        commit = self.branches.get(branch) or self.commits.get(revision)
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    def get_head(self, branch: str) -> Commit:
        """Return the last commit of a branch."""
        if branch not in self.branches:
            raise Refusal(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return self.branches[branch]

    def add_commit(self, branch: str, commit: Commit) -> None:
        """Let a branch point to a commit."""
        self.commits[commit.oid] = commit
        self.branches[branch] = commit


class Objects:
    """The contents of files under a directory, each under its ETag; nothing that a client names becomes a path."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def get_path(self, etag: str) -> Path:
        """Return where the content with this ETag is."""
        return self.directory / etag

    def open_temporary(self) -> Path:
        """Return a new empty file beside the contents."""
        handle, name = tempfile.mkstemp(dir=self.directory, prefix="incoming-")
        os.close(handle)
        return Path(name)

    def add_regular(self, content: bytes) -> Entry:
        """Keep a regular file."""
        entry = Entry(len(content), git_oid("blob", content))
        temporary = self.open_temporary()
        temporary.write_bytes(content)
        temporary.replace(self.get_path(entry.etag))
        return entry

    def add_lfs(self, source: bytes | Path) -> Entry:
        """Keep an LFS file."""
        temporary = self.open_temporary()
        if isinstance(source, bytes):
            temporary.write_bytes(source)
        else:
            shutil.copyfile(source, temporary)
        with temporary.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        entry = make_lfs_entry(sha256, temporary.stat().st_size)
        temporary.replace(self.get_path(entry.etag))
        return entry


def has_lfs_attribute(path: str, gitattributes: str) -> bool:
    """Whether `.gitattributes` sends this path to LFS; the last line that matches decides."""
    found = False
    for line in gitattributes.splitlines():
        pattern, _, attributes = line.strip().partition(" ")
        if not pattern or pattern.startswith("#"):
            continue
        subject = path if "/" in pattern else PurePosixPath(path).name
        if fnmatchcase(subject, pattern.removeprefix("/").replace("**/*", "*")):
            words = attributes.split()
            found = "filter=lfs" in words or (found and not {"-filter", "!filter"} & set(words))
    return found


def choose_mode(path: str, nbytes: int, sample: bytes, gitattributes: str) -> str:
    """Return "lfs" or "regular" for an upload: by attributes, size, and whether it starts like a binary file."""
    if nbytes and (nbytes > REGULAR_MAX_NBYTES or b"\0" in sample or has_lfs_attribute(path, gitattributes)):
        return "lfs"
    return "regular"


def check_path(path: str) -> str:
    """Return a path that a file may have in a repo.

    Raises:
        Refusal: It is absolute, leads upwards, or has a part that git refuses.
    """
    parts = path.split("/")
    if (
        not path
        or len(path) > 1024
        or any(part in ("", ".", "..", ".git") for part in parts)
        or re.search(r"[\0-\x1f\\]", path)
    ):
        raise Refusal(400, f"Invalid path: {path!r}")
    return path


def check_files(files: Iterable[str]) -> None:
    """Raise a Refusal if one path is both a file and a directory."""
    names = set(files)
    for path in names:
        parent = _get_parent(path)
        while parent:
            if parent in names:
                raise Refusal(400, f"Invalid path: {parent} is a file and a directory")
            parent = _get_parent(parent)
