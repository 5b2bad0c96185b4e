"""The output directory: whether a merge may begin, go on, or has nothing to do there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Any

from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.journal import LOCK, Journal, read_fingerprint
from raymerge.pipeline.local_storage import local_path
from raymerge.pipeline.sources import CONFIG, INDEX
from raymerge.pipeline.storage import Storage, storage_for

MANIFEST = "raymerge_manifest.json"
MAX_MANIFEST_NBYTES = 256 * 2**20

_MODEL_FILES = (CONFIG, INDEX, MANIFEST)
"""Without these nothing loads, and nothing looks finished."""
_CLEARING = "being cleared"
"""In place of a fingerprint: no plan has this one."""


class OutputState(Enum):
    """What an output directory is to a plan."""

    NEW = "new"
    UNFINISHED = "unfinished"
    """An earlier run of the same plan was interrupted."""
    COMPLETE = "complete"
    """An earlier run of the same plan has finished."""


def locate_output(out: str | Path) -> str:
    """Return the absolute path of an output directory.

    Raises:
        RaymergeError: it is a URL of a kind that is not supported.
    """
    storage_for(str(out))
    return str(local_path(str(out)).absolute())


def check_apart(out: str, inputs: Sequence[str]) -> None:
    """Refuse an output that lies in an input, or an input in it.

    Raises:
        ConfigError: naming both.
    """
    path = Path(out).resolve()
    for url in inputs:
        other = Path(url).resolve()
        if path == other or path in other.parents or other in path.parents:
            raise ConfigError(f"the output {out} and the input {url} overlap; choose another output directory")


@contextmanager
def open_output(out: str, fingerprint: str, *, overwrite: bool) -> Iterator[OutputState]:
    """Take an output directory for one run, and say what it is to this plan; the journal ends with a run that succeeds.

    Args:
        out: the directory; made if it is not there.
        fingerprint: of the plan.
        overwrite: whether an earlier model there may be deleted.

    Raises:
        OutputError: another run is writing there, or there is something that is not ours to go on with.
    """
    storage = storage_for(out)
    state = _inspect(storage, out, fingerprint)
    if isinstance(state, str) and not overwrite:
        raise OutputError(state)
    with storage.lock(f"{out}/{LOCK}"):
        state = _inspect(storage, out, fingerprint)
        if isinstance(state, str) or (state is OutputState.COMPLETE and overwrite):
            if not overwrite:
                raise OutputError(state)
            _clear(storage, out)
            state = OutputState.NEW
        if state is OutputState.NEW:
            Journal(out, fingerprint).begin()
        yield state
        Journal(out, fingerprint).end()


def _inspect(storage: Storage, out: str, fingerprint: str) -> OutputState | str:
    """Return what a directory is to a plan, or why it is nothing to it."""
    files = _list_files(storage, out)
    if not files:
        return OutputState.NEW
    begun = read_fingerprint(out)
    if begun == fingerprint:
        return OutputState.UNFINISHED
    if begun is not None:
        return (
            f"{out} holds an unfinished merge of another config, seed, set of inputs or version; "
            f"choose another directory, or give --overwrite to start over"
        )
    manifest = _read_manifest(storage, out)
    if manifest.get("fingerprint") == fingerprint:
        missing = [name for name in manifest["files"] if name not in files]
        if not missing:
            return OutputState.COMPLETE
        return f"{out} was finished once, but {', '.join(missing[:3])} is missing; give --overwrite to make it again"
    return (
        f"{out} is not empty ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''}); "
        f"choose another directory, or give --overwrite to replace the model there"
    )


def _clear(storage: Storage, out: str) -> None:
    """Delete a model: what makes it loadable first, the journal last. Hidden files stay, as they are in no model.

    Raises:
        OutputError: the directory does not look like a model, or there is something else in it.
    """
    if read_fingerprint(out) is None:
        _check_is_model(storage, out)
    Journal(out, _CLEARING).begin()  # a run that ends in here leaves something that is known to be half a model
    visible = [name for name in _list_files(storage, out) if not any(part.startswith(".") for part in name.split("/"))]
    for name in sorted(visible, key=lambda name: (name not in _MODEL_FILES, name)):
        storage.delete(f"{out}/{name}")
    Journal(out, _CLEARING).end()


def _check_is_model(storage: Storage, out: str) -> None:
    files = _list_files(storage, out)
    top = [name for name in files if "/" not in name]
    if not any(name in (INDEX, MANIFEST) or name.endswith((".safetensors", ".bin")) for name in top):
        raise OutputError(f"{out} is not empty and does not look like a model; nothing was deleted")
    known = _read_manifest(storage, out).get("files", {})
    others = [name for name in files if "/" in name and not name.startswith(".") and name not in known]
    if others:
        raise OutputError(
            f"{out} holds more than a model ({', '.join(others[:3])}{', ...' if len(others) > 3 else ''}); "
            f"nothing was deleted: choose another directory, or clear this one yourself"
        )


def _list_files(storage: Storage, out: str) -> list[str]:
    return [name for name in storage.list(out) if name != LOCK]


def _read_manifest(storage: Storage, out: str) -> dict[str, Any]:
    """Return a finished output's manifest; empty where there is none, or a damaged one."""
    try:
        manifest = json.loads(storage.read(f"{out}/{MANIFEST}", MAX_MANIFEST_NBYTES))
        return manifest if isinstance(manifest, dict) and isinstance(manifest["files"], dict) else {}
    except (FileNotFoundError, ValueError, KeyError):
        return {}
