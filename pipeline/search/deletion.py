"""Deletes models that a search no longer needs."""

from __future__ import annotations

from contextlib import suppress

from raymerge.pipeline.checkpoint.files import CONFIG, INDEX
from raymerge.pipeline.checkpoint.manifest import MANIFEST, MAX_MANIFEST_NBYTES, parse_manifest
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of


def delete_model(stores: Stores, directory: str) -> None:
    """Delete the files that a merge has written to a directory, those without which nothing loads first.

    The directory goes with its last file. What is not in its manifest stays, and so do a model without one, what a
    manifest lists outside the directory, and a model elsewhere that the directory is a link to.

    Raises:
        OutputError: the store refuses.
    """
    if scheme_of(directory) == "file" and local_path(directory).is_symlink():
        return
    storage = stores.at(directory)
    try:
        manifest = parse_manifest(storage.read(f"{directory}/{MANIFEST}", MAX_MANIFEST_NBYTES))
    except (FileNotFoundError, ValueError):
        return
    names = [name for name in storage.list(directory) if name in manifest.files]
    first = [name for name in (CONFIG, INDEX) if name in names]
    for name in (*first, *(name for name in names if name not in first), MANIFEST):
        storage.delete(f"{directory}/{name}")
    if scheme_of(directory) == "file":
        with suppress(OSError):  # something else is in it
            local_path(directory).rmdir()
