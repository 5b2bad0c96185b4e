"""What a search has come to."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.pipeline.search.record import Trial
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
    values: tuple[tuple[float, ...], ...]
    """Of each of them, by all items of the tasks."""
    stopped: str
    """Why the search ended before its budget was used up; empty otherwise."""
    seconds: float
