"""A branch of the Hub from the first look at it to the one commit in which all changes appear."""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Mapping, Sequence
from urllib.parse import quote

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.hub.api import LOG_IN, HubApi, HubPath, find_endpoint, is_missing, is_offline, parse_json
from raymerge.pipeline.stores.hub.lfs import find_missing
from raymerge.pipeline.stores.hub.stage import Stage, StagedFile
from raymerge.pipeline.stores.retry import Patience, one_line
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError, classify_web

_TITLE_LENGTH = 200
_COMMIT_SECONDS = 60
ATTRIBUTES = ".gitattributes"
"""In every repository from the start; says what goes to LFS, and is in no model."""
"""The Hub adds to it as it sees fit."""


def prepare_branch(api: HubApi, place: HubPath, *, private: bool) -> str:
    """Make sure that a branch is there and may be written to; return its last commit.

    Raises:
        OutputError: nobody is logged in.
        RefusalError: the repository may not be made or written to.
        BrokenError: the Hub is down.
    """
    if not is_offline() and not api.has_token():
        raise OutputError(f"{place.url}: only who is logged in can write to {find_endpoint()}: {LOG_IN}")
    try:
        head = api.find_commit(place)[0]
    except RefusalError as error:
        if not is_missing(error):
            raise
        _create(api, place, has_repo=error.headers.get("X-Error-Code") == "RevisionNotFound", private=private)
        head = api.find_commit(place)[0]
    # whoever may not write is told so here, and not after the first shard
    revision = quote(place.revision, safe="")
    api.post(
        f"/api/models/{place.repo}/preupload/{revision}", {"files": [{"path": "config.json", "sample": "", "size": 0}]}
    )
    return head


def publish_branch(api: HubApi, place: HubPath, stage: Stage, message: str) -> None:
    """Make the changes below a place visible, in one commit.

    Raises:
        OutputError: somebody else has changed the branch, or what was uploaded is no longer there.
        RefusalError: the Hub refuses.
        BrokenError: it is down.
    """
    prefix = f"{place.path}/" if place.path else ""
    staged = [file for path, file in stage.read_all().items() if path.startswith(prefix)]
    if not staged:
        return
    head = api.find_commit(place)[0]
    publication = _Publication(api, place, stage, stage.parent or head, staged)
    if publication.is_wanted(head):
        head = publication.make(message)
    stage.remove(file.path for file in staged)
    stage.set_parent(head)


def check_parent(api: HubApi, place: HubPath, stage: Stage, head: str) -> None:
    """Make sure that changes are still to the last commit of their branch, or that this has them already.

    Raises:
        OutputError: somebody else has changed the branch.
    """
    parent = stage.parent
    if parent is not None and parent != head:
        _Publication(api, place, stage, parent, list(stage.read_all().values())).is_wanted(head)


class _Publication:
    """One commit that is being made."""

    def __init__(self, api: HubApi, place: HubPath, stage: Stage, parent: str, staged: Sequence[StagedFile]) -> None:
        self._api = api
        self._place = place
        self._stage = stage
        self._parent = parent
        self._before = api.list_tree(HubPath(place.repo, parent, ""))
        self._changes = [file for file in staged if _is_change(file, self._before)]

    def is_wanted(self, head: str) -> bool:
        """Return whether there is something to be committed on top of a branch's last commit.

        Raises:
            OutputError: that is not the one that the changes are to, nor has it all of them and no others.
        """
        if head == self._parent:
            return bool(self._changes)
        after = dict(self._before)
        for file in self._changes:
            if file.mode == "delete":
                after.pop(file.path, None)
            else:
                after[file.path] = (file.nbytes, file.etag)
        found = self._api.list_tree(HubPath(self._place.repo, head, ""))
        if self._changes and {**found, ATTRIBUTES: None} == {**after, ATTRIBUTES: None}:
            return False
        raise OutputError(
            f"{self._place.url} was changed by somebody else since this merge began (its last commit is {head},"
            f" {self._parent} was expected); nothing was published. Choose another repository or branch, or start over"
            " with --overwrite"
        )

    def make(self, message: str) -> str:
        """Make it and return its id."""
        url = f"{find_endpoint()}/api/models/{self._place.repo}/commit/{quote(self._place.revision, safe='')}"
        body = self._body(message)
        patience = Patience(self._api.faults, find_endpoint(), "commit")
        while True:
            try:
                headers = {**self._api.headers(url), "Content-Type": "application/x-ndjson"}
                reply = self._api.client.ask("POST", url, headers, body=body, seconds=_COMMIT_SECONDS)
                return str(parse_json(reply)["commitOid"])
            except (RefusalError, BrokenError) as error:
                # the answer may have been lost, and not the request: then the branch is as we want it
                head = self._api.find_commit(self._place)[0]
                if not self.is_wanted(head):
                    return head
                fault = classify_web(error)
                if fault is None:
                    self._check_uploads()
                    raise
                if not patience.failed(fault):
                    raise BrokenError(f"commit: {patience.summary}: {one_line(error)}", None) from None

    def _body(self, message: str) -> bytes:
        title, rest = message[:_TITLE_LENGTH], message[_TITLE_LENGTH:]
        header = {"summary": title, "description": message if rest else "", "parentCommit": self._parent}
        lines: list[dict[str, object]] = [{"key": "header", "value": header}]
        for file in self._changes:
            if file.mode == "delete":
                lines.append({"key": "deletedFile", "value": {"path": file.path}})
            elif file.mode == "lfs":
                value = {"path": file.path, "algo": "sha256", "oid": file.etag, "size": file.nbytes}
                lines.append({"key": "lfsFile", "value": value})
            else:
                content = b64encode(self._stage.content_path(file).read_bytes()).decode()
                lines.append({"key": "file", "value": {"content": content, "path": file.path, "encoding": "base64"}})
        return b"".join(json.dumps(line).encode() + b"\n" for line in lines)

    def _check_uploads(self) -> None:
        """Find out whether a commit was refused because the Hub has thrown away what was uploaded for it."""
        uploaded = {file.etag: file for file in self._changes if file.mode == "lfs"}
        missing = find_missing(self._api, self._place, [(file.etag, file.nbytes) for file in uploaded.values()])
        if missing:
            paths = sorted(file.path for file in self._changes if file.etag in missing)
            self._stage.remove(paths)
            raise OutputError(
                f"{self._place.url}: nothing was published: the Hub no longer has {', '.join(paths[:3])}"
                f"{', ...' if len(paths) > 3 else ''}, which had been uploaded; run the same command again:"
                " it makes only these again"
            )


def _create(api: HubApi, place: HubPath, *, has_repo: bool, private: bool) -> None:
    """Make a repository, and a branch that is not there."""
    owner, _, name = place.repo.partition("/")
    if not has_repo:
        _post_once(api, "/api/repos/create", {"type": "model", "organization": owner, "name": name, "private": private})
    try:
        api.find_commit(place)
    except RefusalError as error:
        if error.headers.get("X-Error-Code") != "RevisionNotFound":
            raise
        # empty, as nothing of another branch belongs to the model
        revision = quote(place.revision, safe="")
        _post_once(api, f"/api/models/{place.repo}/branch/{revision}", {"emptyBranch": True})


def _post_once(api: HubApi, url: str, value: object) -> None:
    """Ask for something to be made, which may be there already: an earlier answer may have been lost."""
    try:
        api.post(url, value)
    except RefusalError as error:
        if error.status != 409:
            raise


def _is_change(file: StagedFile, before: Mapping[str, tuple[int, str]]) -> bool:
    if file.mode == "delete":
        return file.path in before
    return before.get(file.path) != (file.nbytes, file.etag)
