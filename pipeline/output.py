"""The output directory: whether a merge may begin, go on, or has nothing to do there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path

from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.journal import DIRECTORY, Journal, read_fingerprint
from raymerge.pipeline.sources import CONFIG, INDEX
from raymerge.pipeline.storage import Storage, storage_for

MANIFEST = "raymerge_manifest.json"
MAX_MANIFEST_NBYTES = 256 * 2**20

_MODEL_FILES = (CONFIG, INDEX, MANIFEST)


class OutputState(Enum):
    """What an output directory is to a plan."""

    NEW = "new"
    UNFINISHED = "unfinished"
    """An earlier run of the same plan was interrupted."""
    COMPLETE = "complete"
    """An earlier run of the same plan has finished."""


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
    with storage.lock(f"{out}/{DIRECTORY}/lock"):
        state = _inspect(storage, out, fingerprint)
        if isinstance(state, str) or (state is OutputState.COMPLETE and overwrite):
            if not overwrite:
                raise OutputError(state)
            _clear(storage, out)
            state = OutputState.NEW
        if state is OutputState.NEW:
            Journal(out, fingerprint).begin()
        yield state
        storage.delete_tree(f"{out}/{DIRECTORY}")


def read_manifest_fingerprint(storage: Storage, out: str) -> str | None:
    """Return the fingerprint in a finished output's manifest; None where there is no such thing."""
    try:
        manifest = json.loads(storage.read(f"{out}/{MANIFEST}", MAX_MANIFEST_NBYTES))
        fingerprint = manifest["fingerprint"]
    except (FileNotFoundError, ValueError, TypeError, KeyError):
        return None
    return fingerprint if isinstance(fingerprint, str) else None


def _inspect(storage: Storage, out: str, fingerprint: str) -> OutputState | str:
    """Return what a directory is to a plan, or why it is nothing to it."""
    files = [name for name in storage.list(out) if name != f"{DIRECTORY}/lock"]
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
    if read_manifest_fingerprint(storage, out) == fingerprint:
        return OutputState.COMPLETE
    return (
        f"{out} is not empty ({', '.join(files[:3])}{', ...' if len(files) > 3 else ''}); "
        f"choose another directory, or give --overwrite to replace the model there"
    )


def _clear(storage: Storage, out: str) -> None:
    """Delete a model: what makes it loadable first, then every other visible file at the top, then the journal.

    Raises:
        OutputError: the directory does not look like a model.
    """
    files = storage.list(out)
    looks_like_model = any(
        name in _MODEL_FILES or name.endswith((".safetensors", ".bin")) or name.startswith(f"{DIRECTORY}/")
        for name in files
        if name != f"{DIRECTORY}/lock"
    )
    if not looks_like_model:
        raise OutputError(f"{out} is not empty and does not look like a model; nothing was deleted")
    top = [name for name in files if "/" not in name and not name.startswith(".")]
    for name in sorted(top, key=lambda name: (name not in _MODEL_FILES, name)):
        storage.delete(f"{out}/{name}")
    for name in files:
        if name.startswith(f"{DIRECTORY}/") and name != f"{DIRECTORY}/lock":
            storage.delete(f"{out}/{name}")
