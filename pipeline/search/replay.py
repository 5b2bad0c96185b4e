"""The replay of a search from its record, by which a later run goes on from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.search.record import SearchRecord, Trial
from raymerge.pipeline.search.study import Settings


def check_same(record: SearchRecord | None, recipe: str, described: Mapping[str, object], out: str) -> None:
    """Refuse a directory that has another search."""
    if record is None or record.recipe == recipe:
        return
    names = [name for name in described if record.described.get(name) != described[name]]
    differences = ", ".join(_explain_difference(name, record.described.get(name), described[name]) for name in names)
    raise OutputError(f"{out} has another search: {differences}; choose another directory")


def _explain_difference(name: str, old: object, new: object) -> str:
    """Return where two searches differ, in short: of tasks the names, where these tell them apart."""
    if isinstance(old, dict) and isinstance(new, dict):
        old, new = (", ".join(each) for each in (old, new))
        if old == new:
            return f"{name} of the same names with other content or sampling"
    return "another recipe" if name == "recipe" else f"{name} {old} there and {new} here"


def list_batches(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Return the trials of a search, batch by batch."""
    return [list(batch) for _, batch in itertools.groupby(trials, key=lambda trial: trial.batch)]


def check_replayed(
    known: Sequence[Trial], proposals: Sequence[Settings], record: SearchRecord | None, version: str, out: str
) -> None:
    """Refuse to go on with a search whose sampler would not have proposed what was tried."""
    for trial, proposal in zip(known, proposals, strict=True):
        if dict(trial.settings) != dict(proposal):
            made_by = record.optuna if record else "another version"
            raise OutputError(
                f"{out}: {trial.name} has {dict(trial.settings)}, and the sampler proposes {dict(proposal)} now; it was"
                f" made with Optuna {made_by}, and this is {version}: use that one, or choose another directory"
            )
