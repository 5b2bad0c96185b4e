"""The evaluations of a spectrum, read from where `raymerge eval` keeps them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from raymerge import RaymergeError
from raymerge.pipeline.checkpoint.files import CONFIG
from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.evaluation.results import Evaluation, parse_evaluation
from raymerge.pipeline.messages import shown
from raymerge.pipeline.spectrum.places import locate_ref, parse_ref
from raymerge.pipeline.spectrum.record import EVALUATIONS, Spectrum, locate_point
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_READ_ONLY = ("hf", "http", "https")
"""Schemes of stores where no file is written beside others."""
_MAX_NBYTES = 2**20
_NUM_AT_ONCE = 256
"""Files that are read together."""


@dataclass(frozen=True, slots=True)
class Records:
    """Evaluations found beside the record of a spectrum."""

    evaluations: tuple[Evaluation, ...]
    """In the order of their files' names."""
    damaged: tuple[str, ...]
    """Name and fault of each file that is no evaluation; and the models of which none count."""


def locate_evaluations(stores: Stores, directory: str) -> str:
    """Return where `raymerge eval` keeps the evaluations of a spectrum, unless it is told otherwise."""
    if takes_no_files(directory):
        return stores.at(EVALUATIONS).absolute(EVALUATIONS)
    return f"{directory}/{EVALUATIONS}"


def takes_no_files(directory: str) -> bool:
    """Tell whether results cannot be written to a directory one by one."""
    return scheme_of(directory) in _READ_ONLY


def locate_models(directory: str, spectrum: Spectrum) -> dict[str, str]:
    """Return where the points of a spectrum are, and those parents that are on this machine, by their names."""
    found = {point.name: locate_point(directory, point) for point in spectrum.points}
    for parent in spectrum.parents:
        ref = locate_ref(spectrum, directory, parse_ref(parent.model))
        if ref.adapter is None and scheme_of(ref.path) == "file":
            found[parent.name] = ref.path
    return found


def read_evaluations(stores: Stores, place: str, models: Mapping[str, str]) -> Records:
    """Read all evaluations below a directory; none where it has none.

    Those of a model that has been replaced by another of its name are left out.

    Args:
        stores: that have them.
        place: the directory.
        models: where each model is, by its name: an evaluation may say what it likes, and is not followed.

    Raises:
        FetchError: the store refuses or is down.
    """
    files = {
        name: file
        for name, file in stores.at(place).list(place).items()
        if name.endswith(".json") and name.count("/") == 1 and not name.startswith(".")
    }
    found: dict[str, Evaluation] = {}
    damaged = [
        f"{place}/{name} is damaged: it has {file.nbytes:,} bytes, at most {_MAX_NBYTES:,} are expected"
        for name, file in files.items()
        if file.nbytes > _MAX_NBYTES
    ]
    names = [name for name, file in files.items() if file.nbytes <= _MAX_NBYTES]
    for first in range(0, len(names), _NUM_AT_ONCE):
        batch = names[first : first + _NUM_AT_ONCE]
        for name, content in zip(batch, _read_all(stores, [files[name] for name in batch]), strict=True):
            try:
                evaluation = parse_evaluation(content)
                if evaluation.model != name.partition("/")[0]:
                    raise ValueError(f"it is of {shown(evaluation.model)}, in the directory of another model")
                found[name] = evaluation
            except ValueError as error:
                damaged.append(f"{place}/{name} is damaged: {error}")
    kept = _drop_former(stores, place, found, models)
    left_out = dict.fromkeys(each.model for each in found.values()).keys() - {each.model for each in kept}
    notes = [
        f"{model} has been made anew since it was evaluated; `raymerge eval` evaluates what it is now"
        for model in sorted(left_out)
    ]
    return Records(kept, (*damaged, *notes))


def _drop_former(
    stores: Stores, place: str, found: Mapping[str, Evaluation], models: Mapping[str, str]
) -> tuple[Evaluation, ...]:
    """Return the evaluations without those of models that have been replaced by others of the same name."""
    digests: dict[str, set[str]] = defaultdict(set)
    for each in found.values():
        digests[each.model].add(each.digest)
    urls = {
        each.model: models[each.model]
        for name, each in found.items()
        if each.model in models and (len(digests[each.model]) > 1 or _is_older(f"{place}/{name}", models[each.model]))
    }
    current: dict[str, str] = {}
    for model, url in urls.items():
        with suppress(RaymergeError, OSError):  # it may be gone
            stores.at(url).stat(f"{url}/{CONFIG}")
            current[model] = Digests(stores, place).measure(url)
    return tuple(each for each in found.values() if current.get(each.model, each.digest) == each.digest)


def _is_older(evaluation: str, url: str) -> bool:
    """Tell whether an evaluation was written before the merged model that is there now, as far as files tell."""
    if scheme_of(evaluation) != "file" or scheme_of(url) != "file":
        return False
    try:
        return local_path(evaluation).stat().st_mtime_ns < local_path(f"{url}/{MANIFEST}").stat().st_mtime_ns
    except (OSError, ValueError):  # it may be gone
        return False


def _read_all(stores: Stores, files: Sequence[StoredFile]) -> tuple[bytes, ...]:
    return stores.read_ranges([ByteRange(file, 0, file.nbytes) for file in files])
