"""The local cache of huggingface_hub: what is in it need not be read from the Hub."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

from huggingface_hub import constants

from raymerge.cluster.home import find_home
from raymerge.pipeline.errors import CheckpointError, FetchError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.hub.path import HubPath
from raymerge.pipeline.stores.local.writer import file_etag

_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


def find_cached(place: HubPath, file: StoredFile) -> StoredFile | None:
    """Return the local file that has the content of a file of a commit; None where it is not in the cache."""
    directory = _find_directory(place)
    blobs = [directory / "blobs" / file.etag] if _ETAG.fullmatch(file.etag) else []
    for path in (*blobs, directory / "snapshots" / place.revision / place.path):
        with suppress(OSError):
            status = path.stat()
            if status.st_size == file.nbytes:
                return StoredFile(str(path), status.st_size, file_etag(status))
    return None


def find_cached_commit(place: HubPath) -> str:
    """Return the commit that a revision was when it was downloaded.

    Raises:
        CheckpointError: it never was.
    """
    directory = _find_directory(place)
    commit = place.revision
    if not place.is_pinned:
        try:
            commit = (directory / "refs" / place.revision).read_text().strip()
        except OSError:
            raise _not_cached(place) from None
    if not (directory / "snapshots" / commit).is_dir():
        raise _not_cached(place)
    return commit


def list_cached(place: HubPath) -> dict[str, tuple[int, str]]:
    """Return size and etag of each file of a commit that was downloaded, by its path in the repository."""
    snapshot = _find_directory(place) / "snapshots" / place.revision
    found = {}
    for directory, _, names in os.walk(snapshot / place.path):
        for path in (Path(directory, name) for name in names):
            if path.is_file():
                found[path.relative_to(snapshot).as_posix()] = (path.stat().st_size, path.resolve().name)
    return found


def explain_part(place: HubPath) -> str:
    """Say what the cache has of a commit, and how to get the rest."""
    found = listing(sorted(list_cached(place)), 10) or "no file"
    return (
        f"HF_HUB_OFFLINE is set, so only what was downloaded counts: {_find_directory(place)} has {found} of this"
        " revision; download the rest without HF_HUB_OFFLINE, where the Hub can be reached:"
        f" `hf download {place.repo} --revision {place.revision}`"
    )


def not_cached(file: StoredFile) -> FetchError:
    """Return the error for a file that is not in the cache, and may not be read from the Hub."""
    return FetchError(
        f"{file.url}: HF_HUB_OFFLINE is set, and this file is not in {_find_cache()};"
        " unset it, or download the model first: `hf download`"
    )


def _not_cached(place: HubPath) -> CheckpointError:
    directory = _find_directory(place)
    paths = (directory / "refs").rglob("*")
    refs = [path.relative_to(directory / "refs").as_posix() for path in paths if path.is_file()]
    commits = [path.name for path in (directory / "snapshots").glob("*")]
    known = f", which has {listing(sorted(refs) + sorted(commits), 5)} of this repository" if commits else ""
    revision = "" if place.revision == constants.DEFAULT_REVISION else f" --revision {place.revision}"
    return CheckpointError(
        f"{place.url}: HF_HUB_OFFLINE is set, and this revision is not in {_find_cache()}{known};"
        f" unset it, or download the model first: `hf download {place.repo}{revision}`"
    )


def _find_cache() -> Path:
    """Return the cache's directory; where the user has no home, huggingface_hub leaves a `~` in it, and so do we."""
    path = Path(os.environ.get("HF_HUB_CACHE") or constants.HF_HUB_CACHE)
    return path if find_home() is None else path.expanduser()


def _find_directory(place: HubPath) -> Path:
    return _find_cache() / f"models--{place.repo.replace('/', '--')}"
