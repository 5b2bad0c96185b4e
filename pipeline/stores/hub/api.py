"""Requests to the Hugging Face Hub through huggingface_hub, and the meaning of its refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote

from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    __version__,
    constants,
    get_session,
    get_token,
    hf_raise_for_status,
)
from huggingface_hub.file_download import HfFileMetadata
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.lfs import UploadInfo, post_lfs_batch_info

import raymerge
from raymerge.pipeline.decoding import decode
from raymerge.pipeline.errors import CorruptedError, FetchError
from raymerge.pipeline.stores.hub.path import HubPath, find_endpoint, is_offline
from raymerge.pipeline.stores.hub.session import StorageRefusalError, own_requests, quiet
from raymerge.pipeline.stores.retry import Fault, FaultLog, one_line, retry
from raymerge.pipeline.stores.web.client import origin_of
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web
from raymerge.pipeline.urls import suggest_directory

T = TypeVar("T")

LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"

_MAX_FILES = 100_000
_MAX_TITLE_LENGTH = 200
_MAX_CORRUPTED = 4
"""Times that a file is sent whose bytes do not arrive as they are."""
_HAS_OTHER_BYTES = (400, 404, 409, 422)
"""Statuses for bytes that differ from those announced, when they are sent, joined or verified."""
_BAD_TOKEN = "Invalid credentials"


class HubApi:
    """Asks the Hub, again where that may help. Endpoint and token are those of the environment at each call.

    All methods raise RefusalError where the Hub refuses, and BrokenError where it is down or cannot be reached.
    """

    def __init__(self, faults: FaultLog) -> None:
        self.faults = faults

    @property
    def hub(self) -> HfApi:
        """The client for the endpoint that is set now."""
        return HfApi(find_endpoint(), library_name="raymerge", library_version=raymerge.__version__)

    def headers(self, url: str) -> dict[str, str]:
        """Return the headers of a ranged request: with the token only if it goes to the Hub itself."""
        own = {"User-Agent": f"raymerge/{raymerge.__version__}; hf_hub/{__version__}"}
        token = self._find_token() if origin_of(url) == origin_of(find_endpoint()) else None
        return {**own, "Authorization": f"Bearer {token}"} if token else own

    def has_token(self) -> bool:
        """Tell whether there is a token."""
        return self._find_token() is not None

    def _find_token(self) -> str | None:
        return None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()

    def ask(
        self,
        operation: str,
        function: Callable[[], T],
        classify: Callable[[Exception], Fault | None] = classify_web,
    ) -> T:
        """Carry out what may be repeated without harm.

        Args:
            operation: for the record of faults, such as `list`.
            function: calls huggingface_hub.
            classify: returns the fault that an error is, or None where trying again is useless.
        """
        if is_offline():
            raise BrokenError("HF_HUB_OFFLINE is set; unset it", None)
        endpoint = find_endpoint()

        def attempt() -> T:
            with own_requests(endpoint):
                return function()

        def give_up(error: Exception, summary: str) -> Exception:
            return BrokenError(f"{operation}: {summary}: {one_line(error)}", None)

        return retry(
            attempt, faults=self.faults, store=endpoint, operation=operation, classify=classify, give_up=give_up
        )

    # reading

    def find_commit(self, place: HubPath) -> tuple[str, bool]:
        """Return the commit that a revision is now, and whether the repository is gated."""

        def look() -> tuple[str, bool]:
            info = self.hub.model_info(place.repo, revision=place.revision)
            if not place.at(str(info.sha)).is_pinned:
                raise TypeError(f"{info.sha!r} is given for a commit")
            return str(info.sha), bool(info.gated)

        return self.ask("revision", look)

    def list_tree(self, place: HubPath) -> dict[str, tuple[int, str]]:
        """Return size and etag of each file below a place, by its path in the repository."""

        def collect() -> dict[str, tuple[int, str]]:
            found: dict[str, tuple[int, str]] = {}
            entries = self.hub.list_repo_tree(place.repo, place.path or None, recursive=True, revision=place.revision)
            for number, entry in enumerate(entries):
                if number > _MAX_FILES:
                    raise FetchError(f"{place.url}: its listing does not end; {len(found):,} files so far")
                if isinstance(entry, RepoFile):
                    found[entry.path] = _size_and_etag(entry)
            return found

        return self.ask("list", collect)

    def find_file(self, place: HubPath) -> tuple[int, str] | None:
        """Return a file's size and etag; None where there is no such file, branch or repository."""

        def look() -> tuple[int, str] | None:
            infos = self.hub.get_paths_info(place.repo, [place.path], revision=place.revision)
            return next((_size_and_etag(info) for info in infos if isinstance(info, RepoFile)), None)

        try:
            return self.ask("stat", look)
        except RefusalError as error:
            if is_missing(error):
                return None
            raise

    def find_content(self, place: HubPath) -> tuple[str, int | None, str]:
        """Return where a file's bytes are, which stay the same there; their size, where the Hub says it, and etag."""

        def url_of(revision: str) -> str:
            return f"{find_endpoint()}/{place.repo}/resolve/{quote(revision, safe='')}/{quote(place.path)}"

        url = url_of(place.revision)

        def look() -> HfFileMetadata:
            metadata = self.hub.get_hf_file_metadata(url=url)
            origin_of(metadata.location)
            return metadata

        found = self.ask("HEAD", look)
        is_here = found.location == url and found.commit_hash is not None
        return url_of(found.commit_hash or "") if is_here else found.location, found.size, found.etag or ""

    # writing

    def create_repo(self, place: HubPath, *, private: bool) -> None:
        """Make a repository, unless there is one."""
        self.ask("create", lambda: self.hub.create_repo(place.repo, private=private, exist_ok=True))

    def create_empty_branch(self, place: HubPath) -> None:
        """Make a branch without files, which HfApi cannot; nothing of another branch belongs to the model."""

        def create() -> None:
            hub = self.hub
            url = f"{hub.endpoint}/api/models/{place.repo}/branch/{quote(place.revision, safe='')}"
            response = get_session().post(url, headers=hub._build_hf_headers(), json={"emptyBranch": True})
            if response.status_code != 409:  # it is there: an earlier answer was lost
                hf_raise_for_status(response)

        self.ask("create", create)

    def upload(self, place: HubPath, addition: CommitOperationAdd) -> None:
        """Send a file's content, unless the Hub has it or it goes with the commit, and note which of the two.

        Raises:
            CorruptedError: other bytes arrive than are sent, each time.
        """
        num_corrupted = 0

        def send() -> None:
            with quiet():
                self.hub.preupload_lfs_files(place.repo, [addition], revision=place.revision)

        def classify(error: Exception) -> Fault | None:
            is_expired = isinstance(error, StorageRefusalError) and error.status == 403
            return Fault("403 expired URL") if is_expired else classify_web(error)

        while True:
            try:
                return self.ask("upload", send, classify)
            except RefusalError as error:
                if error.status not in _HAS_OTHER_BYTES or "X-Error-Code" in error.headers:
                    raise
                num_corrupted += 1
                self.faults.note(find_endpoint(), "upload", "other bytes arrived")
                if num_corrupted == _MAX_CORRUPTED:
                    raise CorruptedError(
                        f"{place.url}: sent {num_corrupted} times, and the store does not take it as what was sent"
                        f" ({one_line(error)}); is there a broken proxy?"
                    ) from None

    def commit(
        self,
        place: HubPath,
        operations: Iterable[CommitOperationAdd | CommitOperationDelete],
        message: str,
        parent: str,
    ) -> str:
        """Make a commit on a branch whose last one is `parent`, and return its id."""

        def create() -> str:
            with quiet():
                made = self.hub.create_commit(
                    place.repo,
                    operations,
                    commit_message=message[:_MAX_TITLE_LENGTH],
                    commit_description=message if len(message) > _MAX_TITLE_LENGTH else "",
                    revision=place.revision,
                    parent_commit=parent,
                )
            return made.oid

        return self.ask("commit", create)

    def find_missing(self, place: HubPath, contents: Iterable[tuple[str, int]]) -> set[str]:
        """Return which of some contents, by sha256 and size, the repository has not."""
        infos = [UploadInfo(nbytes, b"", bytes.fromhex(sha256)) for sha256, nbytes in contents]

        def look() -> set[str]:
            hub, missing = self.hub, set()
            for start in range(0, len(infos), 100):
                found, *_ = post_lfs_batch_info(
                    infos[start : start + 100],
                    token=None,
                    repo_type="model",
                    repo_id=place.repo,
                    revision=quote(place.revision, safe=""),
                    endpoint=hub.endpoint,
                    headers=hub._build_hf_headers(),
                )
                missing |= {each["oid"] for each in found if "upload" in (each.get("actions") or {})}
            return missing

        return self.ask("stat", look)

    # errors

    def explain(self, error: Exception, place: HubPath) -> str:
        """Return the message for a request that failed for good: the request, where, and the next step."""
        endpoint = find_endpoint()
        if not isinstance(error, RefusalError):
            return f"{place.url}: {endpoint}: {one_line(error)}"
        code = error.headers.get("X-Error-Code") or ""
        if code == "GatedRepo":
            get_access = f"open {endpoint}/{place.repo} and accept the terms there"
            return (
                f"{place.url}: a gated repository, and this account has no access yet; {get_access}"
                if self.has_token()
                else f"{place.url}: a gated repository; {get_access}, then {LOG_IN}"
            )
        if code == "RevisionNotFound":
            return f"{place.url}: the repository has no revision {place.revision!r}; see {endpoint}/{place.repo}"
        if code == "EntryNotFound":
            return f"{place.url}: no such file or directory in the repository"
        if error.status == 401 and self.has_token() and code != "RepoNotFound":
            return f"{place.url}: {endpoint} does not accept the token ({one_line(error)}); {LOG_IN}"
        if code == "RepoNotFound" or error.status in (401, 404):
            who = (
                "this account may not read it"
                if self.has_token()
                else f"it is private and you are not logged in: {LOG_IN}"
            )
            directory = Path(place.repo)
            local = f" If a directory was meant, {place.repo} is none either{suggest_directory(directory)}"
            local = "" if directory.exists() else local
            return f"{place.url}: no such repository at {endpoint}, or {who}.{local}"
        if error.status == 403:
            return f"{place.url}: {endpoint} refuses ({one_line(error)}); check what the token may do, or {LOG_IN}"
        return f"{place.url}: {endpoint} refuses: {one_line(error)}"


def is_missing(error: RefusalError) -> bool:
    """Tell whether a refusal says that a repository, a revision or a path is not there, as far as one may know."""
    if error.headers.get("X-Error-Code") in ("RepoNotFound", "RevisionNotFound"):
        return True
    return error.status == 404 or (error.status == 401 and _BAD_TOKEN not in str(error))


def check_listed(path: object, nbytes: object, etag: object) -> None:
    """Make sure that path, size and etag of a file, as a Hub lists it, are those of one; raises TypeError."""
    names = decode(path, str).split("/")
    if not {"", ".", ".."}.isdisjoint(names) or "\0" in str(path):
        raise TypeError(f"{path!r} is given for a path")
    if decode(nbytes, int) < 0 or not decode(etag, str):
        raise TypeError(f"{path!r} has {nbytes} bytes, etag {etag!r}")


def _size_and_etag(file: RepoFile) -> tuple[int, str]:
    """Return a file's size and etag; raises TypeError where the answer is not that of a Hub."""
    etag = file.lfs.sha256 if file.lfs else file.blob_id
    check_listed(file.path, file.size, etag)
    return file.size, etag
