"""search.json: what a search has tried, and what came of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import shown
from raymerge.pipeline.redact import redact_texts
from raymerge.pipeline.search.values import UNMEASURED
from raymerge.pipeline.stores.open import Stores

RECORD = "search.json"
_MAX_NBYTES = 64 * 2**20
_NAME = r"trial-\d{4,}"
"""Regular expression of a trial's name."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One proposal of the sampler."""

    name: str
    batch: int
    """Number of the batch that it was proposed with."""
    settings: Mapping[str, object]
    """A value for each path; plain JSON."""
    values: tuple[float, ...] | None
    """For each objective; None where it failed."""
    same_as: str
    """An earlier trial with the same plan, whose values these are; empty where there is none."""
    error: str
    """Why it failed; empty otherwise."""
    told_failed: bool = False
    """Whether it had failed when the sampler was told of it, and a later run has found the values: replayed so."""

    @property
    def is_tried_again(self) -> bool:
        """Whether the next run tries it again: it failed, and not because its model lacks a figure."""
        return self.values is None and self.error != UNMEASURED


@dataclass(frozen=True, slots=True)
class SearchRecord:
    """A search as far as it has come; the fields are the keys of the JSON."""

    raymerge: str
    """Version that made it."""
    optuna: str
    recipe: str
    """Hash of everything that decides what is proposed: recipe, sampler, seed, size of a batch, objectives, tasks."""
    described: Mapping[str, object]
    """The same in words."""
    trials: tuple[Trial, ...]
    """Trials of whole batches, in order."""

    def dump(self) -> str:
        """Return the text of the file, without credentials."""
        return json.dumps(redact_texts(asdict(self)), indent=1, ensure_ascii=False) + "\n"


def read_record(stores: Stores, directory: str) -> SearchRecord | None:
    """Read the record of a search; None where there is none.

    Raises:
        OutputError: it is damaged, or has a trial of another name than searches give: models are deleted by these.
    """
    url = f"{directory}/{RECORD}"
    try:
        content = stores.at(url).read(url, _MAX_NBYTES)
    except FileNotFoundError:
        return None
    try:
        record: SearchRecord = decode(parse_json(content), SearchRecord)
        if odd := next((trial.name for trial in record.trials if not re.fullmatch(_NAME, trial.name)), ""):
            raise ValueError(f"{shown(odd)} is no name of a trial")
    except (TypeError, KeyError, ValueError) as error:
        raise OutputError(f"{url} is damaged: {error}; choose another directory for the search") from error
    return record


def write_record(stores: Stores, directory: str, record: SearchRecord) -> None:
    """Write or replace the record of a search, in one step."""
    url = f"{directory}/{RECORD}"
    stores.at(url).write(url, record.dump().encode())
