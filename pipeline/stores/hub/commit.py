"""A branch of the Hub from the first look at it to the commit with which its model can be loaded."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from huggingface_hub import CommitOperationAdd, CommitOperationDelete
from huggingface_hub.lfs import UploadInfo

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.stores.hub.api import LOG_IN, HubApi, is_missing
from raymerge.pipeline.stores.hub.path import HubPath, find_endpoint, is_offline
from raymerge.pipeline.stores.hub.pending import PendingChanges, PendingFile
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError

MAX_CHANGES = 98
"""In one commit: the Hub advises fewer than 100 files, and may add `ATTRIBUTES`."""

ATTRIBUTES = ".gitattributes"
"""In every repository from the start; says what goes to LFS, and is in no model. The Hub adds to it as it sees fit."""


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
    api.upload(place, CommitOperationAdd("config.json", b""))  # sends nothing; refused now, not after the first shard
    return head


def settle(api: HubApi, place: HubPath, pending: PendingChanges, head: str) -> None:
    """Make sure that changes are to the last commit of their branch; where that commit is one of ours, note it.

    Raises:
        OutputError: somebody else has changed the branch.
    """
    parent = pending.parent
    if parent is None:
        pending.set_parent(head)
    elif parent != head:
        changes = pending.read_underway()  # a run may have ended before it could note that these were committed
        before, found = api.list_tree(place.at(parent)), api.list_tree(place.at(head))
        if not changes or not _leads_to(before, changes, found):
            raise OutputError(
                f"{place.url} was changed by somebody else since this merge began (its last commit is {head},"
                f" {parent} was expected); nothing was published. Choose another repository or branch, or start over"
                " with --overwrite"
            )
        pending.settle(head, changes)


def publish_branch(
    api: HubApi, place: HubPath, pending: PendingChanges, message: str, last: Collection[str] = ()
) -> None:
    """Make the changes below a place visible, in as few commits as can be.

    Args:
        api: of the Hub.
        place: a directory of the branch.
        pending: the changes to the branch.
        message: for the last commit.
        last: names of files, in the directory, without which no model there can be loaded: of several commits the
            first deletes them, and the last brings them.

    Raises:
        OutputError: somebody else has changed the branch, or what was uploaded is no longer there.
        RefusalError: the Hub refuses.
        BrokenError: it is down.
    """
    prefix = f"{place.path}/" if place.path else ""
    files = [file for path, file in pending.read_all().items() if path.startswith(prefix)]
    if not files:
        return
    root = place.root
    head = api.find_commit(root)[0]
    settle(api, root, pending, head)
    parts = split_changes(files, api.list_tree(root.at(head)), {prefix + name for name in last})
    for number, part in enumerate(parts, start=1):
        title = message if number == len(parts) else f"Part {number} of {len(parts)}: {message}"
        head = _commit(api, root, pending, part, title, head)
    pending.settle(head, files)


def split_changes(
    files: Sequence[PendingFile], before: Mapping[str, tuple[int, str]], last: Collection[str]
) -> list[list[PendingFile]]:
    """Return the changes of each commit that it takes to publish some files; see `publish_branch`."""
    changes = [file for file in files if not file.is_in(before)]
    if len(changes) <= MAX_CHANGES:
        return [changes] if changes else []
    tail = [file for file in files if file.path in last and file.mode != "delete"]  # even those that stay the same
    gone = [PendingFile(file.path, "delete") for file in tail if file.path in before]
    gone += sorted((file for file in changes if file.mode == "delete"), key=lambda file: file.path not in last)
    rest = [*gone, *(file for file in changes if file not in tail and file.mode != "delete")]
    parts = [rest[start : start + MAX_CHANGES] for start in range(0, len(rest), MAX_CHANGES)]
    if len(parts) > 1 and len(parts[-1]) + len(tail) <= MAX_CHANGES:
        parts[-1] += tail
    elif tail:
        parts.append(tail)
    return parts


def _commit(
    api: HubApi, root: HubPath, pending: PendingChanges, changes: Sequence[PendingFile], message: str, parent: str
) -> str:
    """Make one commit and return its id."""
    operations = [_make_operation(api, root, pending, change) for change in changes]
    pending.set_underway(changes)
    try:
        head = api.commit(root, operations, message, parent)
    except (RefusalError, BrokenError) as error:
        head = api.find_commit(root)[0]
        if head == parent:
            if isinstance(error, RefusalError):
                _check_uploads(api, root, pending, changes)
            raise
        settle(api, root, pending, head)  # the answer may have been lost, and not the request
    pending.settle(head, changes)
    return head


def _make_operation(
    api: HubApi, root: HubPath, pending: PendingChanges, change: PendingFile
) -> CommitOperationAdd | CommitOperationDelete:
    if change.mode == "delete":
        return CommitOperationDelete(change.path, is_folder=False)
    if change.mode == "uploaded":
        addition = CommitOperationAdd(change.path, b"")
        addition.upload_info = UploadInfo(change.nbytes, b"", bytes.fromhex(change.sha256))
        addition._upload_mode, addition._is_uploaded = "lfs", True  # by another process, maybe
        return addition
    addition = CommitOperationAdd(change.path, pending.content_path(change))
    addition.upload_info.sha256 = bytes.fromhex(change.sha256)
    api.upload(root, addition)
    return addition


def _check_uploads(api: HubApi, root: HubPath, pending: PendingChanges, changes: Sequence[PendingFile]) -> None:
    """Find out whether a commit was refused because the Hub has thrown away what was uploaded for it."""
    uploaded = [change for change in changes if change.mode == "uploaded"]
    missing = api.find_missing(root, {(change.sha256, change.nbytes) for change in uploaded})
    if missing:
        paths = sorted(change.path for change in uploaded if change.sha256 in missing)
        pending.remove(paths)
        raise OutputError(
            f"{root.url}: nothing was published: the Hub no longer has {listing(paths)}, which had been"
            " uploaded; run the same command again: it makes only these again"
        )


def _create(api: HubApi, place: HubPath, *, has_repo: bool, private: bool) -> None:
    """Make a repository, and a branch that is not there."""
    if not has_repo:
        api.create_repo(place, private=private)
    try:
        api.find_commit(place)
    except RefusalError as error:
        if error.headers.get("X-Error-Code") != "RevisionNotFound":
            raise
        api.create_empty_branch(place)


def _leads_to(
    before: Mapping[str, tuple[int, str]], changes: Sequence[PendingFile], after: Mapping[str, tuple[int, str]]
) -> bool:
    """Tell whether a tree has all of some changes, and no others."""
    changed = {change.path for change in changes} | {ATTRIBUTES}
    is_same = {path: entry for path, entry in before.items() if path not in changed} == {
        path: entry for path, entry in after.items() if path not in changed
    }
    return is_same and all(change.is_in(after) for change in changes)
