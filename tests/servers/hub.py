"""A small Hugging Face Hub for tests: repos with real history, LFS behind signed URLs on another host, real errors.

    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        hub.create_repo("me/model", private=True)
        hub.upload("me/model", {"config.json": b"{}", "model.safetensors": Path("model.safetensors")})
        ...  # HF_ENDPOINT=hub.url, HF_TOKEN=hf_writer

Files come by LFS, or by Xet in so far as clients on this machine send them; there is no pull request, no data set or
Space, and `.gitignore` files are not looked at.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.servers.hub_api import HubHandler
from tests.servers.hub_buckets import Bucket
from tests.servers.hub_collections import Collection as ModelCollection
from tests.servers.hub_git import (
    GITATTRIBUTES,
    LFS_ATTRIBUTES,
    Commit,
    Entry,
    Objects,
    Repo,
    check_files,
    check_path,
    choose_mode,
    has_lfs_attribute,
    make_commit,
)
from tests.servers.hub_http import Refusal, Request
from tests.servers.hub_lfs import Storage
from tests.servers.hub_read import HubListener
from tests.servers.hub_xet import XetStore

Content = bytes | Path


@dataclass(frozen=True)
class Token:
    """What a bearer of a token may do; scopes are namespaces or repo ids."""

    user: str
    can_read: frozenset[str]
    """Which private and gated repos are open to it."""
    can_write: frozenset[str]

    def may_read(self, repo_id: str) -> bool:
        return bool({repo_id, repo_id.partition("/")[0]} & (self.can_read | self.can_write))

    def may_write(self, repo_id: str) -> bool:
        return bool({repo_id, repo_id.partition("/")[0]} & self.can_write)


class HubServer:
    """The Hub and its object storage, between `with` and its end.

    Args:
        directory: Where the contents of files are kept; nothing is written elsewhere.
        page_length: Entries per page of a listing.
        signature_seconds: How long signed URLs given out from now on are good for.
        part_nbytes: Objects larger than this are uploaded in parts of so many bytes; None: never in parts.
        redirect_regular: Answer requests for regular files with a relative redirect, as the Hub does.
    """

    def __init__(
        self,
        directory: Path,
        *,
        page_length: int = 1000,
        signature_seconds: float = 3600,
        part_nbytes: int | None = None,
        redirect_regular: bool = False,
    ) -> None:
        self.page_length = page_length
        self.signature_seconds = signature_seconds
        self.part_nbytes = part_nbytes
        self.redirect_regular = redirect_regular
        self.objects = Objects(directory / "objects")
        self.storage = Storage(self.objects)
        self.xet = XetStore(directory / "xet")
        self.repos = self.storage.repos
        self.buckets: dict[str, Bucket] = {}
        self.collections: dict[str, ModelCollection] = {}
        self.tokens: dict[str, Token] = {}
        self.lock = self.storage.lock
        self._listener = HubListener(HubHandler, self)
        self.url = f"http://127.0.0.1:{self._listener.server_address[1]}"
        self._quota: int | None = None
        self._retry_after = 0.0
        self._window_end: float | None = None

    def environment(self, directory: Path, token: str | None = "hf_writer") -> dict[str, str]:
        """Return the variables that lead huggingface_hub here, and that keep what it stores in a directory."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(directory / "hf"),
            "HF_HUB_CACHE": str(directory / "hf" / "hub"),
            "HF_HUB_DISABLE_XET": "1",
            "XDG_STATE_HOME": str(directory / "state"),
            **({"HF_TOKEN": token} if token else {}),
        }

    def __enter__(self) -> HubServer:
        self.storage.start()
        self._listener.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.stop()
        self.storage.stop()
        failures = self._listener.failures + self.storage.failures
        assert error is not None or not failures, "the test Hub itself failed:\n" + "\n".join(failures)

    @property
    def requests(self) -> list[Request]:
        """What the Hub was asked, in order, apart from its storage."""
        return self._listener.requests

    @property
    def storage_requests(self) -> list[Request]:
        """What the storage was asked, in order."""
        return self.storage.requests

    @property
    def leaked_tokens(self) -> list[str]:
        """The Authorization headers that were sent to the storage; clients should send none."""
        return self.storage.leaked_tokens

    def reset_requests(self) -> None:
        """Forget what was asked until now, of both."""
        self._listener.requests.clear()
        self.storage.requests.clear()

    def add_token(
        self, token: str, *, user: str, can_write: Collection[str] = (), can_read: Collection[str] = ()
    ) -> None:
        """Accept a token; its user's own namespace is readable in any case."""
        self.tokens[token] = Token(user, frozenset([user, *can_read]), frozenset(can_write))

    def create_repo(self, repo_id: str, *, private: bool = False, gated: str | bool = False) -> None:
        """Create a repo whose first commit has a `.gitattributes`; gated is False, "auto" or "manual" (True)."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]{0,95}", repo_id, re.ASCII) or re.search(
            r"\.\.|--|\.git$|[.-]$|[.-]/", repo_id
        ):
            raise Refusal(400, f"Invalid repo id: {repo_id!r}")
        with self.lock:
            if repo_id in self.repos:
                refusal = Refusal(409, "You already created this model repo")
                refusal.fields["url"] = f"{self.url}/{repo_id}"
                raise refusal
            self.repos[repo_id] = repo = Repo(repo_id, private, "manual" if gated is True else gated)
            files = {".gitattributes": self.objects.add_regular(GITATTRIBUTES)}
            repo.add_commit("main", make_commit(None, files, "initial commit", "", repo_id.partition("/")[0]))

    def create_bucket(self, bucket_id: str, *, private: bool = False) -> None:
        """Create a bucket."""
        bucket = Bucket(f"buckets/{bucket_id}", private)
        self.buckets[bucket_id] = self.storage.repos[bucket.id] = bucket

    def read_bucket(self, bucket_id: str) -> dict[str, bytes]:
        """Return the content of all files of a bucket, without asking over HTTP."""
        entries = self.buckets[bucket_id].entries
        return {path: self.objects.get_path(entry.sha256).read_bytes() for path, entry in entries.items()}

    def delete_repo(self, repo_id: str) -> None:
        """Delete a repo."""
        with self.lock:
            del self.repos[repo_id]

    def upload(self, repo_id: str, files: Mapping[str, Content], *, branch: str = "main", title: str = "Upload") -> str:
        """Commit files, LFS or not as the Hub would choose; return the commit's id."""
        with self.lock:
            repo = self.repos[repo_id]
            changes: dict[str, Entry | None] = {}
            attributes = self.read_attributes(repo.get_head(branch))
            for path, content in files.items():
                nbytes = len(content) if isinstance(content, bytes) else content.stat().st_size
                if choose_mode(check_path(path), nbytes, _read_sample(content), attributes) == "lfs":
                    changes[path] = entry = self.objects.add_lfs(content)
                    repo.lfs_objects[entry.etag] = nbytes
                else:
                    changes[path] = self.objects.add_regular(
                        content if isinstance(content, bytes) else content.read_bytes()
                    )
            return self.commit(repo, branch, changes, title, "", repo_id.partition("/")[0]).oid

    def commit(
        self, repo: Repo, branch: str, changes: Mapping[str, Entry | None], title: str, description: str, author: str
    ) -> Commit:
        """Add a commit with these changes (None deletes), and LFS lines in `.gitattributes` where they are missing."""
        head = repo.get_head(branch)
        files = {path: entry for path, entry in {**head.files, **changes}.items() if entry is not None}
        check_files(files)
        attributes = self._read_attributes(files)
        added = [path for path, entry in changes.items() if entry and entry.sha256]
        if lines := [f"{path} {LFS_ATTRIBUTES}\n" for path in added if not has_lfs_attribute(path, attributes)]:
            files[".gitattributes"] = self.objects.add_regular((attributes + "".join(lines)).encode())
        commit = make_commit(head, files, title, description, author)
        repo.add_commit(branch, commit)
        return commit

    def get_head(self, repo_id: str, branch: str = "main") -> str:
        """Return the id of a branch's last commit."""
        return self.repos[repo_id].get_head(branch).oid

    def move_branch(self, repo_id: str, branch: str, revision: str) -> None:
        """Let a branch, new or not, point to another commit, as a forced push would."""
        with self.lock:
            repo = self.repos[repo_id]
            repo.branches[branch] = repo.get_commit(revision)

    def read_files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Return the content of all files of a revision, without asking over HTTP."""
        files = self.repos[repo_id].get_commit(revision).files
        return {path: self.objects.get_path(entry.etag).read_bytes() for path, entry in files.items()}

    def read_attributes(self, commit: Commit) -> str:
        """Return the text of a commit's `.gitattributes`."""
        return self._read_attributes(commit.files)

    def _read_attributes(self, files: Mapping[str, Entry]) -> str:
        entry = files.get(".gitattributes")
        return self.objects.get_path(entry.etag).read_text() if entry else ""

    def expire_urls(self) -> None:
        """Make all signed URLs given out until now invalid."""
        self.storage.secret = secrets.token_bytes(32)

    def limit_rate(self, *, after: int, retry_after: int) -> None:
        """Serve so many more requests, then answer 429 until so many seconds after the first refusal; once."""
        with self.lock:
            self._quota, self._retry_after, self._window_end = after, retry_after, None

    def take_quota(self) -> None:
        """Count a request.

        Raises:
            Refusal: The limit set by `limit_rate` is reached.
        """
        with self.lock:
            if self._quota is None:
                return
            if self._quota > 0:
                self._quota -= 1
                return
            self._window_end = self._window_end or time.monotonic() + self._retry_after
            left = self._window_end - time.monotonic()
            if left <= 0:
                self._quota = None
                return
        seconds = str(max(1, round(left)))
        headers = {
            "Retry-After": seconds,
            "RateLimit": f'"api";r=0;t={seconds}',
            "RateLimit-Policy": '"fixed window";"api";q=500;w=300',
        }
        raise Refusal(
            429, "We had to rate limit you: you hit the quota of 500 api requests per 5 minutes", None, headers
        )


def _read_sample(content: Content) -> bytes:
    if isinstance(content, bytes):
        return content[:512]
    with content.open("rb") as file:
        return file.read(512)
