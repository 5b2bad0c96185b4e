"""The Hugging Face Hub: ranged reads of pinned commits, and outputs that can be loaded with their last commit.

A journal and a lock cannot live in a repository; they are kept on this machine, beside the changes that are not
published yet.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from huggingface_hub.utils._runtime import is_xet_available

from raymerge.pipeline.errors import CheckpointError, FetchError, MergeError, OutputError
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile, check_same
from raymerge.pipeline.stores.hub.api import is_missing
from raymerge.pipeline.stores.hub.cache import explain_part, find_cached, find_cached_commit, list_cached, not_cached
from raymerge.pipeline.stores.hub.collection import gather
from raymerge.pipeline.stores.hub.commit import ATTRIBUTES, prepare_branch, publish_branch, settle
from raymerge.pipeline.stores.hub.files import XET_NBYTES, HubFiles
from raymerge.pipeline.stores.hub.path import HubPath, is_offline, parse_hub_url
from raymerge.pipeline.stores.hub.pending import PendingChanges, PendingFile
from raymerge.pipeline.stores.hub.writer import HubWriter
from raymerge.pipeline.stores.local.storage import LocalStorage
from raymerge.pipeline.stores.local.writer import file_etag
from raymerge.pipeline.stores.remote import CHUNK_NBYTES
from raymerge.pipeline.stores.retry import FaultLog
from raymerge.pipeline.stores.seam import Lock, Writer
from raymerge.pipeline.stores.web.errors import BrokenError, RefusalError

_JOURNAL = ".raymerge"
_HASH = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
"""An etag of the Hub: the hash of a file's content."""

Tree = Mapping[str, tuple[int, str]]


class HubStorage(HubFiles):
    """Model repositories of the Hub."""

    library_nbytes = 8 * 2**20  # for huggingface_hub

    def __init__(self, faults: FaultLog, *, private: bool) -> None:
        """Begin.

        Args:
            faults: where what goes wrong is noted.
            private: whether repositories that are made are private.
        """
        super().__init__(faults)
        self.write_nbytes = XET_NBYTES if is_xet_available() else 32 * CHUNK_NBYTES
        self._private = private
        self._local = LocalStorage()
        self._trees: dict[HubPath, Tree] = {}
        self._cached: dict[StoredFile, StoredFile | None] = {}

    def absolute(self, url: str) -> str:  # noqa: D102
        return parse_hub_url(url).url

    def resolve(self, url: str) -> str:
        """Return the URL at the commit that its branch is now, by which inputs are known too."""
        place = parse_hub_url(url)
        if place.is_pinned or is_offline():
            return place.url
        with self._explained(place, FetchError):
            try:
                return place.at(self.api.find_commit(place)[0]).url
            except RefusalError as error:
                if not is_missing(error):
                    raise
                return place.url

    def check_space(self, url: str, nbytes: int) -> None:
        """Refuse what is no branch; how much room there is cannot be known, but that changes can be kept here can."""
        place = parse_hub_url(url)
        _check_writable(place)
        PendingChanges(place.root).check_place()

    def pin(self, url: str, revision: str | None) -> str:
        """Return the URL of a directory at the commit that a revision is now: one request, two for a gated model."""
        place = parse_hub_url(url)
        if revision is not None and "@" in url:
            raise CheckpointError(f"{url}: a revision is in the URL already, and {revision!r} is given too; leave one")
        if revision is not None and "%" in revision:  # as in our own URLs, where a slash of a revision is %2F
            place = parse_hub_url("/".join(filter(None, (f"hf://{place.repo}@{revision}", place.path))))
            revision = None
        places = [place.at(revision or place.revision)]
        if revision is not None and "/" in revision:  # org/name@revision/directory, in a config
            first, _, rest = revision.partition("/")
            places.append(HubPath(place.repo, first, "/".join(filter(None, (rest, place.path)))))
        if is_offline():
            return place.at(find_cached_commit(places[0])).url
        for number, candidate in enumerate(places, start=1):
            try:
                commit, is_gated = self.api.find_commit(candidate)
                if is_gated:
                    self._check_access(candidate.at(commit))
                return candidate.at(commit).url
            except RefusalError as error:
                if error.headers.get("X-Error-Code") != "RevisionNotFound" or number == len(places):
                    raise CheckpointError(self.api.explain(error, places[0])) from None
            except BrokenError as error:
                raise FetchError(self.api.explain(error, places[0])) from None
        raise AssertionError(places)

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        place = parse_hub_url(url)
        if _is_journal(place):
            return replace(self._local.stat(PendingChanges(place.root).journal_path(place.path)), url=url)
        if place.is_pinned:
            found = self._read_tree(place).get(place.path)
        else:
            change = PendingChanges(place.root).find(place.path)
            found = self._find_on_branch(place) if change is None else _size_and_etag(change)
        if found is None:
            raise FileNotFoundError(f"{url}: no such file")
        return StoredFile(url, *found)

    def list(self, url: str) -> Mapping[str, StoredFile]:  # noqa: D102
        place = parse_hub_url(url)
        found: dict[str, tuple[int, str]] = {}
        if place.is_pinned:
            found |= self._read_tree(place)
        elif not _is_journal(place):
            found |= self._read_branch(place)
        found.pop(ATTRIBUTES, None)
        prefix = f"{place.path}/" if place.path else ""
        base = place.url
        files = {
            path.removeprefix(prefix): StoredFile(f"{base}/{path.removeprefix(prefix)}", *entry)
            for path, entry in found.items()
            if path.startswith(prefix)
        }
        if not place.is_pinned:
            for name, file in self._local.list(PendingChanges(place.root).journal_path(place.path)).items():
                if _JOURNAL in (prefix + name).split("/"):
                    files[name] = replace(file, url=f"{base}/{name}")
        return dict(sorted(files.items()))

    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0) -> None:
        """Fill each buffer with its range, from this machine where the bytes are here already."""
        sources = {file: self._find_here(file) for file in dict.fromkeys(item.file for item in ranges)}
        pairs = list(zip(ranges, buffers, strict=True))
        for item in ranges:
            item.check()
        here = [(replace(item, file=source), view) for item, view in pairs if (source := sources[item.file])]
        if here:
            self._local.read_into([item for item, _ in here], [view for _, view in here])
        there = [(item, view) for item, view in pairs if sources[item.file] is None]
        if there:
            super().read_into([item for item, _ in there], [view for _, view in there], max_gap=max_gap)

    def check_unchanged(self, file: StoredFile) -> None:
        """Compare a file with what it was when the plan was made; a commit's files stay what they are."""
        if parse_hub_url(file.url).is_pinned:
            return
        try:
            found = self.stat(file.url)
        except FileNotFoundError:
            raise FetchError(f"{file.url}: was there when the plan was made, and has changed: it is deleted") from None
        check_same(file, found.nbytes, found.etag)

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        place = parse_hub_url(url)
        _check_writable(place)
        pending = PendingChanges(place.root)
        if _is_journal(place):
            return self._local.open_writer(pending.journal_path(place.path), nbytes, exclusive=exclusive)

        def is_there() -> bool:
            change = pending.find(place.path)
            return self._find_on_branch(place) is not None if change is None else change.mode != "delete"

        return HubWriter(place, nbytes, self.api, pending, is_there if exclusive else None)

    def delete(self, url: str) -> None:
        """Take a file out of what is to be published, or note that it is to be deleted then."""
        place = parse_hub_url(url)
        _check_writable(place)
        pending = PendingChanges(place.root)
        if _is_journal(place):
            self._local.delete(pending.journal_path(place.path))
        elif self._find_on_branch(place) is not None:
            pending.put(PendingFile(place.path, "delete"))
        else:
            pending.remove([place.path])

    @contextmanager
    def lock(self, url: str, *, restart: bool = False) -> Iterator[Lock]:
        """Hold a lock on this machine, and make sure that the branch is there and may be written to.

        Runs on other machines are kept apart by the commit that the changes are to: only one can publish.
        """
        place = parse_hub_url(url)
        _check_writable(place)
        root = place.root
        pending = PendingChanges(root)
        try:
            with pending.lock(url, place.path) as lock:
                self._begin(root, pending, restart=restart)
                try:
                    yield lock
                finally:
                    if not pending.is_begun:
                        pending.forget()
        finally:
            pending.tidy()

    def explain_part(self, url: str) -> str:  # noqa: D102
        place = parse_hub_url(url)
        return explain_part(place) if is_offline() and place.is_pinned else ""

    def publish(self, url: str, message: str, last: Collection[str] = ()) -> None:  # noqa: D102
        place = parse_hub_url(url)
        with self._explained(place, OutputError):
            publish_branch(self.api, place, PendingChanges(place.root), message, last)

    def gather(self, url: str, members: Sequence[str]) -> str:  # noqa: D102
        place = parse_hub_url(url)
        with self._explained(place, OutputError):
            return gather(self.api, place, [parse_hub_url(each).repo for each in members])

    def close(self) -> None:  # noqa: D102
        super().close()
        self._local.close()
        with self._guard:
            self._trees.clear()
            self._cached.clear()

    def explain(self, error: Exception, url: str) -> FetchError:  # noqa: D102
        return FetchError(self.api.explain(error, parse_hub_url(url)))

    def locate(self, file: StoredFile) -> str:  # noqa: D102
        place = parse_hub_url(file.url)
        url, nbytes, etag = self.api.find_content(place)
        if not _HASH.fullmatch(etag):  # a mirror may give none, or one of its own
            etag = file.etag if place.is_pinned else (self._find_on_branch(place) or (0, ""))[1]
        check_same(file, file.nbytes if nbytes is None else nbytes, etag)
        return url

    def _begin(self, root: HubPath, pending: PendingChanges, *, restart: bool) -> None:
        """Make sure that a branch can be written to, and note the commit that the changes are to."""
        with self._explained(root, OutputError):
            head = prepare_branch(self.api, root, private=self._private)
            if not pending.is_begun:
                pending.set_parent(head)
                return
            try:
                settle(self.api, root, pending, head)
            except OutputError:
                if not restart:
                    raise
                pending.clear()
                pending.set_parent(head)

    def _find_here(self, file: StoredFile) -> StoredFile | None:
        """Return the local file that has a file's bytes; None where they are to be read from the Hub."""
        place = parse_hub_url(file.url)
        if _is_journal(place):
            return replace(file, url=PendingChanges(place.root).journal_path(place.path))
        if place.is_pinned:
            if file not in self._cached:
                self._cached[file] = find_cached(place, file)
            if self._cached[file] is None and is_offline():
                raise not_cached(file)
            return self._cached[file]
        pending = PendingChanges(place.root)
        change = pending.find(place.path)
        if change is None:
            return None
        found = _size_and_etag(change)
        if found is None:
            raise FetchError(f"{file.url}: changed since the plan was made: it is deleted")
        check_same(file, *found)
        if change.mode == "uploaded":
            raise FetchError(f"{file.url}: uploaded, and cannot be read before it is published")
        return _stat_here(pending.content_path(change))

    def _find_on_branch(self, place: HubPath) -> tuple[int, str] | None:
        """Return size and etag of a file as it is published now; None where there is none."""
        with self._explained(place, FetchError):
            return self.api.find_file(place)

    def _read_tree(self, place: HubPath) -> Tree:
        """Return the files of a commit, which is asked for once."""
        root = place.root
        with self._guard:
            known = self._trees.get(root)
        if known is None:
            with self._explained(place, FetchError):
                known = list_cached(root) if is_offline() else self.api.list_tree(root)
            with self._guard:
                self._trees[root] = known
        return known

    def _read_branch(self, place: HubPath) -> Tree:
        """Return the files of a branch, pending ones included; none where there is no such branch."""
        with self._explained(place, FetchError):
            try:
                found = self.api.list_tree(place)
            except RefusalError as error:
                if not is_missing(error):
                    raise
                found = {}
        for path, change in PendingChanges(place.root).read_all().items():
            entry = _size_and_etag(change)
            if entry is None:
                found.pop(path, None)
            else:
                found[path] = entry
        return found

    def _check_access(self, place: HubPath) -> None:
        """Make sure that files of a gated repository may be read."""
        try:
            self.api.find_content(replace(place, path="config.json"))
        except RefusalError as error:
            if error.headers.get("X-Error-Code") != "EntryNotFound":
                raise

    @contextmanager
    def _explained(self, place: HubPath, kind: type[MergeError]) -> Iterator[None]:
        """Raise what the Hub refuses as an error of this kind."""
        try:
            yield
        except (RefusalError, BrokenError) as error:
            raise kind(self.api.explain(error, place)) from None


def _is_journal(place: HubPath) -> bool:
    return _JOURNAL in place.path.split("/")


def _check_writable(place: HubPath) -> None:
    if place.is_pinned:
        raise OutputError(f"{place.url}: a commit does not change; give a branch, or leave the revision out")


def _size_and_etag(change: PendingFile) -> tuple[int, str] | None:
    return None if change.mode == "delete" else (change.nbytes, change.etag)


def _stat_here(path: Path) -> StoredFile:
    status = path.stat()
    return StoredFile(str(path), status.st_size, file_etag(status))
