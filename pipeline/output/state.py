"""The output directory: whether a merge may begin, go on, or has nothing to do there."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from enum import Enum
from pathlib import Path

from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG, CONFIG, INDEX, PIPELINE, is_of_model
from raymerge.pipeline.checkpoint.manifest import MANIFEST, MAX_MANIFEST_NBYTES, Contents, parse_manifest
from raymerge.pipeline.errors import ConfigError, HeldError, OutputError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.output.journal import DIRECTORY, LOCK, Journal, read_begun
from raymerge.pipeline.plan.types import InputModel
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Lock, Storage
from raymerge.pipeline.urls import is_url, suggest_directory

_MODEL_FILES = (CONFIG, INDEX, PIPELINE, ADAPTER_CONFIG, MANIFEST)
"""Without these nothing loads, and nothing looks finished."""
_SHOWN = 10
"""Names of files that are in the way which a message lists."""
_WAIT_SECONDS = 2.0
"""Between looks at whether another run has ended."""

_CLEARING = "being cleared"
"""In place of a fingerprint: no plan has this one."""


class OutputState(Enum):
    """State of an output directory with respect to a plan."""

    NEW = "new"
    UNFINISHED = "unfinished"
    """An earlier run of the same plan was interrupted."""
    COMPLETE = "complete"
    """An earlier run of the same plan has finished."""


def locate_output(stores: Stores, out: str | Path) -> str:
    """Return the absolute path or URL of an output directory.

    Raises:
        ConfigError: it is a malformed URL.
    """
    return stores.at(str(out)).absolute(str(out))


def check_apart(stores: Stores, out: str, inputs: Sequence[InputModel]) -> None:
    """Refuse an output that lies in an input, or in which an input or a file of one lies, links followed.

    Raises:
        ConfigError: naming both.
    """
    storage = stores.at(out)
    target = storage.resolve(out)
    for item in inputs:
        if stores.at(item.url) is not storage:
            continue
        for url in (item.url, *(f"{item.url}/{name}" for name in item.names)):
            other = storage.resolve(url)
            if f"{target}/".startswith(f"{other}/") or other.startswith(f"{target}/"):
                raise ConfigError(f"the output {out} and the input {url} overlap; choose another output directory")


def check_state(stores: Stores, out: str, fingerprint: str, *, overwrite: bool) -> OutputState:
    """Return the state of an output directory; NEW where its content is to be deleted first. Writes nothing.

    Raises:
        OutputError: there is something that is not ours to go on with, or to delete.
    """
    storage = stores.at(out)
    storage.check_space(out, 0)  # says so where nothing can be written at all
    state = _inspect(stores, out, fingerprint)
    if not overwrite and not isinstance(state, OutputState):
        raise OutputError(state)
    if isinstance(state, OutputState) and not (state is OutputState.COMPLETE and overwrite):
        return state
    _find_deletable(stores, out)
    return OutputState.NEW


def measure_nbytes(stores: Stores, out: str) -> int:
    """Return the bytes of the model that is in an output directory, and of what is unfinished there."""
    storage = stores.at(out)
    files = {**_list_visible(storage, out), **storage.list(f"{out}/{DIRECTORY}")}
    return sum(file.nbytes for file in files.values())


@contextmanager
def open_output(
    stores: Stores,
    out: str,
    fingerprint: str,
    names: Sequence[str],
    *,
    overwrite: bool,
    on_held: Callable[[HeldError], None] | None = None,
) -> Iterator[tuple[OutputState, Lock]]:
    """Take an output directory for one run, and say what it is to this plan; the journal ends with a run that succeeds.

    Call `check_state` before: where that refuses, there is not to be as much as a lock.

    Args:
        stores: of this merge.
        out: the directory; made if it is not there.
        fingerprint: of the plan.
        names: of the files that the plan makes.
        overwrite: whether an earlier model there may be deleted.
        on_held: told, once, that another run is writing there, which is then waited for.

    Raises:
        HeldError: another run is writing there, and is not waited for.
        OutputError: there is something that is not ours to go on with.
    """
    storage = stores.at(out)
    with ExitStack() as stack:
        is_told = False
        while True:
            try:
                lock = stack.enter_context(storage.lock(f"{out}/{LOCK}", restart=overwrite))
                break
            except HeldError as error:
                if on_held is None:
                    raise HeldError(f"{error}; --wait waits for it") from error
                if not is_told:
                    on_held(error)
                    is_told = True
                time.sleep(_WAIT_SECONDS)
        state = check_state(stores, out, fingerprint, overwrite=overwrite)
        if state is OutputState.NEW:
            if overwrite:
                _clear(stores, out)
            Journal(stores, out, fingerprint).begin(names)
        yield state, lock
        Journal(stores, out, fingerprint).end()


def read_manifest(stores: Stores, out: str) -> Contents:
    """Return a finished output's manifest.

    Raises:
        FileNotFoundError: there is none, but other files, or a merge that has begun.
        OutputError: nothing is there.
        CheckpointError: there is no such repository, or none that may be read.
        ValueError: it is damaged.
    """
    try:
        return _load_manifest(stores, out)
    except FileNotFoundError:
        storage = stores.at(out)
        if read_begun(stores, out) is None and not storage.list(storage.pin(out, None)):
            raise _nothing_there(out) from None
        raise


def _load_manifest(stores: Stores, out: str) -> Contents:
    return parse_manifest(stores.at(out).read(f"{out}/{MANIFEST}", MAX_MANIFEST_NBYTES))


def find_unlisted(stores: Stores, out: str, manifest: Contents) -> list[str]:
    """Return the visible files that a manifest does not know of."""
    return [name for name in _list_visible(stores.at(out), out) if name not in manifest.files and name != MANIFEST]


def _nothing_there(out: str) -> OutputError:
    if is_url(out):
        return OutputError(f"{out}: nothing is there; check the name, and that you may list it")
    path = Path(out)
    hint = suggest_directory(path)
    if not hint and path.parent.parent == Path.cwd():
        hint = f"; if a repository on the Hub is meant, write hf://{path.parent.name}/{path.name}"
    if not path.is_dir():
        return OutputError(f"{out}: no such directory{hint}")
    return OutputError(f"{out} has no {MANIFEST}: it was not made by raymerge, or is not a model{hint}")


def _inspect(stores: Stores, out: str, fingerprint: str) -> OutputState | str:
    """Return the state of a directory, or the reason why a plan cannot use it."""
    begun = read_begun(stores, out)
    if begun is not None:
        if begun.fingerprint == fingerprint:
            return OutputState.UNFINISHED
        return (
            f"{out} holds an unfinished merge of another config, seed, --shard-size, set of inputs, file of --ops or "
            f"version; give what it was begun with to go on, choose another directory"
            f"{_advise_overwrite(stores, out, 'start over')}"
        )
    files = {name: file for name, file in stores.at(out).list(out).items() if not name.startswith(f"{DIRECTORY}/")}
    if not files:
        return OutputState.NEW
    manifest = _find_manifest(stores, out)
    if manifest is None or manifest.fingerprint != fingerprint:
        advice = _advise_overwrite(stores, out, "replace the model there")
        return f"{out} is not empty ({listing(files)}); choose another directory{advice}"
    changes = list(_compare_sizes(manifest, files))
    if changes:
        return (
            f"{out} was finished once, but {listing(changes)}; give --overwrite to make it again"
            f" (`raymerge verify` lists everything that has changed)"
        )
    return OutputState.COMPLETE


def _compare_sizes(manifest: Contents, found: Mapping[str, StoredFile]) -> Iterator[str]:
    for name, expected in manifest.files.items():
        if name not in found:
            yield f"{name} is missing"
        elif found[name].nbytes != expected.nbytes:
            yield f"{name} has {found[name].nbytes:,} bytes instead of {expected.nbytes:,}"


def _clear(stores: Stores, out: str) -> None:
    """Delete a model: what makes it loadable first, the journal last. Hidden files stay, as they are in no model.

    Raises:
        OutputError: the directory does not look like a model, or there is something else in it.
    """
    names = _find_deletable(stores, out)
    journal = Journal(stores, out, _CLEARING)
    journal.begin(names)  # a run that ends in here leaves something that is known to be half a model
    for name in sorted(names, key=lambda name: (name not in _MODEL_FILES, name)):
        stores.at(out).delete(f"{out}/{name}")
    journal.end()


def _find_deletable(stores: Stores, out: str) -> list[str]:
    """Return the files of the model in a directory: those that raymerge has made, or all of what looks like a model.

    Raises:
        OutputError: the directory does not look like a model, or there is something else in it.
    """
    visible = list(_list_visible(stores.at(out), out))
    begun, manifest = read_begun(stores, out), _find_manifest(stores, out)
    known: Set[str]
    if begun is not None:
        known = begun.files
    elif manifest is not None:
        known = manifest.files.keys() | {MANIFEST}
    else:
        known = {name for name in visible if is_of_model(name)}
        is_empty = all(name.startswith(f"{DIRECTORY}/") for name in stores.at(out).list(out))
        if not is_empty and not _is_model(known):
            raise OutputError(f"{out} is not empty and does not look like a model; nothing was deleted")
    others = [name for name in visible if name not in known]
    if others:
        raise OutputError(
            f"{out} holds more than a model ({listing(others, _SHOWN)}); "
            f"nothing was deleted: choose another directory, or clear this one yourself"
        )
    return visible


def _advise_overwrite(stores: Stores, out: str, purpose: str) -> str:
    """Return the advice to overwrite, where that would not be refused."""
    try:
        _find_deletable(stores, out)
    except OutputError:
        return ""
    return f", or give --overwrite to {purpose}"


def _is_model(names: Set[str]) -> bool:
    has_weights = any(name.endswith((".safetensors", ".bin")) for name in names)
    return INDEX in names or MANIFEST in names or (CONFIG in names and has_weights)


def _list_visible(storage: Storage, out: str) -> dict[str, StoredFile]:
    files = storage.list(out)
    return {name: file for name, file in files.items() if not any(part.startswith(".") for part in name.split("/"))}


def _find_manifest(stores: Stores, out: str) -> Contents | None:
    """Return a finished output's manifest; None where there is none, or a damaged one."""
    try:
        return _load_manifest(stores, out)
    except (FileNotFoundError, ValueError):
        return None
