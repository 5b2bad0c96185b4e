"""The evaluations of a spectrum, read from where `raymerge eval` keeps them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from raymerge.pipeline.evaluation.results import Evaluation, parse_evaluation
from raymerge.pipeline.spectrum.record import EVALUATIONS
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 2**20
_NUM_AT_ONCE = 256
"""Files that are read together."""


@dataclass(frozen=True, slots=True)
class Records:
    """What was found beside the record of a spectrum."""

    evaluations: tuple[Evaluation, ...]
    """In the order of their files' names."""
    damaged: tuple[str, ...]
    """Of each file that is none: its name, and what is wrong with it."""


def read_evaluations(stores: Stores, directory: str) -> Records:
    """Read all evaluations of a spectrum; none where the directory has none.

    Raises:
        FetchError: the store refuses or is down.
    """
    place = f"{directory}/{EVALUATIONS}"
    files = {
        name: file
        for name, file in stores.at(place).list(place).items()
        if name.endswith(".json") and name.count("/") == 1 and not name.startswith(".")
    }
    found: list[Evaluation] = []
    damaged = [
        f"{EVALUATIONS}/{name} is damaged: it has {file.nbytes:,} bytes, at most {_MAX_NBYTES:,} are expected"
        for name, file in files.items()
        if file.nbytes > _MAX_NBYTES
    ]
    names = [name for name, file in files.items() if file.nbytes <= _MAX_NBYTES]
    for first in range(0, len(names), _NUM_AT_ONCE):
        batch = names[first : first + _NUM_AT_ONCE]
        for name, content in zip(batch, _read_all(stores, [files[name] for name in batch]), strict=True):
            try:
                found.append(parse_evaluation(content))
            except ValueError as error:
                damaged.append(f"{EVALUATIONS}/{name} is damaged: {error}")
    return Records(tuple(found), tuple(damaged))


def _read_all(stores: Stores, files: Sequence[StoredFile]) -> tuple[bytes, ...]:
    return stores.read_ranges([ByteRange(file, 0, file.nbytes) for file in files])
