"""spectrum.json: the models of a spectrum, what each was made with, and their parents."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Literal

from raymerge.pipeline.config.sections.sweep import NAME
from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import HeldError, OutputError
from raymerge.pipeline.messages import counted, shown
from raymerge.pipeline.output.journal import LOCK
from raymerge.pipeline.redact import redact, redact_texts
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import is_url, repository_of, scheme_of

RECORD = "spectrum.json"
TABLE = "spectrum.parquet"
EVALUATIONS = "evaluations"
"""Directory of the evaluations, beside the record."""
_MAX_NBYTES = 64 * 2**20
_LOCK_SECONDS, _LOCK_TRIES = 0.5, 60
"""Between tries to lock the record, and how many: it is held for a moment only."""

State = Literal["planned", "complete", "failed"]
"""State of a point: its model is yet to be made, or was deleted after it was evaluated; is there; cannot be made."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A model that the recipe names."""

    name: str
    """Short, unlike all other parents' and points' names."""
    model: str
    """As the config writes it: a path, URL or Hub repository, with its adapter and revision if any; `places.locate_ref`
    returns where that is."""
    is_base: bool
    """Whether it is the recipe's `base_model`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model of a spectrum."""

    name: str
    """Unique; valid as a directory, an S3 key and a part of a Hub repository's name, such as `t-0.1`."""
    url: str
    """Name of its directory beside the record, or the URL of its repository on the Hub."""
    settings: Mapping[str, object]
    """The value at each path of the config that was varied, such as `{"t": 0.1, "weight[1]": 0.4}`; plain JSON."""
    config: str
    """Its own YAML, which merges to the same bytes with its seed."""
    fingerprint: str
    """Fingerprint of its plan: points with equal ones are one model. Empty where it could not be planned."""
    state: State
    error: str
    """Why it failed; empty otherwise."""
    seed: int = 0
    """Seed of its merge."""
    shard_size: int | None = None
    """Largest file of its merge, in bytes; None where the output's size decides."""
    trust_headers: bool = False
    """Whether its merge goes by the weight files where an input's index disagrees."""
    ops: str = ""
    """SHA-256 of the Python file that declares its merge method; empty where raymerge does."""


@dataclass(frozen=True, slots=True)
class Spectrum:
    """The models of one recipe; the fields are the keys of the JSON."""

    raymerge: str
    """Version that made it."""
    config: str
    """The recipe's YAML as given."""
    paths: tuple[str, ...]
    """The paths of the config that are varied, in the order given."""
    parents: tuple[Parent, ...]
    points: tuple[Point, ...]
    started_in: str = ""
    """Directory of this machine in which the sweep ran: relative paths of the YAML begin there. Empty where there are
    none, and on the Hub."""
    place: str = ""
    """The spectrum's own directory then, by which it is known what has moved together with it; empty likewise."""
    local: tuple[str, ...] = ()
    """Names in the YAML that were directories of this machine, not repositories of the Hub; none likewise."""

    @property
    def sorted_points(self) -> tuple[Point, ...]:
        """The points as tables show them: by their values at the paths, though a sweep was extended by some in between.

        Values at a path that are not all numbers go by where they first appear.
        """
        ranks = [_rank_values([point.settings.get(path) for point in self.points]) for path in self.paths]
        order = sorted(range(len(self.points)), key=lambda place: [each[place] for each in ranks])
        return tuple(self.points[place] for place in order)

    def dump(self) -> str:
        """Return the text of the file, without credentials."""
        return json.dumps(redact_texts(asdict(self)), indent=1, ensure_ascii=False) + "\n"


def _rank_values(values: Sequence[object]) -> list[float]:
    """Return for each value what it is sorted by.

    >>> _rank_values([0.5, 1, 0.2]), _rank_values(["ties", 2, "ties"])
    ([0.5, 1, 0.2], [0, 1, 0])
    """
    numbers = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    if len(numbers) == len(values):
        return numbers
    texts = [json.dumps(each, sort_keys=True) for each in values]
    first = list(dict.fromkeys(texts))
    return [first.index(text) for text in texts]


def parse_spectrum(content: bytes) -> Spectrum:
    """Return the spectrum that a record describes.

    Raises:
        ValueError: it is damaged, or has a name or URL that leads out of its directory, but to the Hub: models are
            written, and deleted, by these.
    """
    try:
        spectrum: Spectrum = decode(parse_json(content), Spectrum)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    names = [*(point.name for point in spectrum.points), *(parent.name for parent in spectrum.parents)]
    for name in (*names, *(point.url for point in spectrum.points if scheme_of(point.url) != "hf")):
        if not re.fullmatch(NAME, name):
            raise ValueError(f"{shown(name)} is no name of a model")
    return spectrum


def read_spectrum(stores: Stores, directory: str) -> Spectrum:
    """Read the record of a spectrum.

    Raises:
        OutputError: there is none, or it is damaged.
    """
    url = f"{directory}/{RECORD}"
    try:
        return parse_spectrum(stores.at(url).read(url, _MAX_NBYTES))
    except FileNotFoundError:
        raise OutputError(
            f"{directory} has no {RECORD}; `raymerge sweep CONFIG {directory} --set ...` makes one"
        ) from None
    except ValueError as error:
        raise OutputError(
            f"{url} is damaged: {error}; `raymerge sweep` with --overwrite writes it anew, or move it away"
        ) from error


def read_before(stores: Stores, directory: str, *, overwrite: bool) -> Spectrum | None:
    """Return the record that is there; None where there is none, or it is damaged and is to be overwritten.

    Raises:
        OutputError: it is damaged.
    """
    try:
        return read_spectrum(stores, directory) if has_spectrum(stores, directory) else None
    except OutputError:
        if not overwrite:
            raise
        return None


def write_spectrum(stores: Stores, directory: str, spectrum: Spectrum) -> None:
    """Write or replace the record of a spectrum, and its table."""
    storage = stores.at(directory)
    storage.write(f"{directory}/{TABLE}", dump_table(spectrum))
    storage.write(f"{directory}/{RECORD}", spectrum.dump().encode())


def update_spectrum(
    stores: Stores, directory: str, change: Callable[[Spectrum | None], Spectrum], *, overwrite: bool = False
) -> Spectrum:
    """Change the record of a spectrum, or begin it, while nobody else does; return it as it is then.

    Args:
        stores: of the record.
        directory: the spectrum's.
        change: is given the record, or None where there is none or it is to be overwritten, and returns the new one.
        overwrite: whether a damaged record is as good as none.

    Raises:
        OutputError: it cannot be written, or is damaged, or others have held it for too long.
    """
    storage = stores.at(directory)
    with ExitStack() as stack:
        for left in range(_LOCK_TRIES - 1, -1, -1):
            try:
                stack.enter_context(storage.lock(f"{directory}/{LOCK}", restart=overwrite))
                break
            except HeldError:
                if not left:
                    raise
                time.sleep(_LOCK_SECONDS)
        before = read_before(stores, directory, overwrite=overwrite)
        after = change(before)
        if after != before:
            write_spectrum(stores, directory, after)
            storage.publish(directory, f"Spectrum of {counted(len(after.points), 'model')}", last=[RECORD])
    return after


def has_spectrum(stores: Stores, directory: str) -> bool:
    """Tell whether a directory has the record of a spectrum."""
    url = f"{directory}/{RECORD}"
    try:
        stores.at(url).stat(url)
    except FileNotFoundError:
        return False
    return True


def choose_url(directory: str, name: str) -> str:
    """Return where the model of a new point goes: beside the record, or to a Hub repository of its own.

    >>> choose_url("/data/spectrum", "t-0.1"), choose_url("hf://me/spectrum", "t-0.1")
    ('t-0.1', 'hf://me/spectrum-t-0.1')
    """
    repository = repository_of(directory)
    return f"hf://{repository}-{name}" if repository else name


def locate_point(directory: str, point: Point) -> str:
    """Return the path or URL of a point's model."""
    return point.url if is_url(point.url) else f"{directory.rstrip('/')}/{point.url}"


def dump_table(spectrum: Spectrum) -> bytes:
    """Return the points as Parquet: a row for each, with a column for each path that is varied.

    A column holds numbers where all its values are numbers, and JSON otherwise.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    from raymerge.pipeline.checkpoint.columns import make_numbers, make_texts

    points = spectrum.points
    columns = {
        field: make_texts([redact(getattr(point, field)) for point in points])
        for field in ("name", "url", "state", "fingerprint", "error")
    }
    for path in spectrum.paths:
        values = [point.settings.get(path) for point in points]
        numbers = [
            value if isinstance(value, int | float) and not isinstance(value, bool) else None for value in values
        ]
        if numbers == values:
            columns[path] = make_numbers(numbers, pa.float64())
        else:
            texts = [None if value is None else redact(json.dumps(value, ensure_ascii=False)) for value in values]
            columns[path] = make_texts(texts)
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_arrays([*columns.values()], [*columns]), sink)
    content: bytes = sink.getvalue().to_pybytes()
    return content
