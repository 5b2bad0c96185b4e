"""spectrum.json: the models of a spectrum, what each was made with, and their parents."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.redact import redact_texts
from raymerge.pipeline.stores.open import Stores

RECORD = "spectrum.json"
EVALUATIONS = "evaluations"
"""Directory of the evaluations, beside the record."""
_MAX_NBYTES = 64 * 2**20

State = Literal["planned", "complete", "failed"]
"""Of a point: its model is yet to be made, or was deleted after it was evaluated; is there; cannot be made."""


@dataclass(frozen=True, slots=True)
class Parent:
    """A model that the recipe names."""

    name: str
    """Short, unlike all other parents' and points' names."""
    model: str
    """As the config writes it: a path, URL or Hub repository, with its adapter and revision if any."""
    is_base: bool
    """Whether it is the recipe's `base_model`."""


@dataclass(frozen=True, slots=True)
class Point:
    """One model of a spectrum."""

    name: str
    """Unique; valid as a directory, an S3 key and a part of a Hub repository's name, such as `t-0.1`."""
    url: str
    """Where its model is: a name beside the record, or a URL."""
    settings: Mapping[str, object]
    """The value at each path of the config that was varied, such as `{"t": 0.1, "weight[1]": 0.4}`; plain JSON."""
    config: str
    """Its own YAML, which merges to the same bytes."""
    fingerprint: str
    """Of its plan: equal ones are one model. Empty where it could not be planned."""
    state: State
    error: str
    """Why it failed; empty otherwise."""


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

    def dump(self) -> str:
        """Return the text of the file, without credentials."""
        return json.dumps(redact_texts(asdict(self)), indent=1, ensure_ascii=False) + "\n"


def parse_spectrum(content: bytes) -> Spectrum:
    """Return the spectrum that a record describes.

    Raises:
        ValueError: it is damaged.
    """
    try:
        spectrum: Spectrum = decode(parse_json(content), Spectrum)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
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
        raise OutputError(f"{url} is damaged: {error}; run the sweep again, which writes it anew") from error


def write_spectrum(stores: Stores, directory: str, spectrum: Spectrum) -> None:
    """Write or replace the record of a spectrum, in one step."""
    url = f"{directory}/{RECORD}"
    stores.at(url).write(url, spectrum.dump().encode())
