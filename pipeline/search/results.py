"""Results of a search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from raymerge.pipeline.search.record import Trial
from raymerge.pipeline.search.values import Values
from raymerge.pipeline.spectrum.record import Point


@dataclass(frozen=True, slots=True)
class SearchReport:
    """The report of a search."""

    out: str
    objectives: tuple[str, ...]
    trials: tuple[Trial, ...]
    """All trials of the directory, in order."""
    best: tuple[Point, ...]
    """The models that no other is better than, best first by the first objective."""
    values: tuple[Values, ...]
    """Values of each of them, by all items of the tasks."""
    parents: Mapping[str, Values | None]
    """Values of the models that the recipe merges; None where one could not be evaluated."""
    beating: Mapping[str, tuple[str, ...]]
    """For each parent with values, those of the best that are as good in every objective and better in one."""
    beaten: Mapping[str, tuple[str, ...]]
    """For those of the best that a parent is better than in this sense, these parents."""
    stopped: str
    """Why the search ended before its budget was used up; empty otherwise."""
    seconds: float
    parent_errors: Mapping[str, str]
    """Why parents could not be evaluated."""

    @property
    def failed(self) -> tuple[Trial, ...]:
        """The trials without values; the next run tries those again that `is_tried_again`."""
        return tuple(trial for trial in self.trials if trial.values is None)

    @property
    def beating_all(self) -> tuple[str, ...]:
        """The models that beat every parent with values."""
        return tuple(point.name for point in self.best if all(point.name in own for own in self.beating.values()))
