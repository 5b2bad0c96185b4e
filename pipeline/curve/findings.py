"""What a view shows: the Pareto front, dominated parents, and phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.curve.front import find_dominators, find_front
from raymerge.pipeline.curve.phases import Jump, find_jumps
from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Model, View


@dataclass(frozen=True, slots=True)
class Findings:
    """What the scores of one view say."""

    front: tuple[str, ...]
    """Points and parents that no other one matches with fewer tokens, by tokens; empty where no tokens were counted."""
    dominators: Mapping[str, tuple[str, ...]]
    """For each parent with accuracy and tokens the points that are as good or better in both, by tokens."""
    jumps: tuple[Jump, ...]


def find(view: View, models: Sequence[Model], series: Sequence[Series]) -> Findings:
    """Return what a view shows. Models that are neither points nor parents do not count."""
    kinds = {model.name: model.kind for model in models}
    costs = {name: cost for name, cost in view.costs().items() if kinds[name] != "other"}
    points = {name: cost for name, cost in costs.items() if kinds[name] == "point"}
    return Findings(
        find_front(costs),
        {
            name: find_dominators(name, {**points, name: cost})
            for name, cost in costs.items()
            if kinds[name] == "parent"
        },
        tuple(jump for line in series for jump in find_jumps(line, view.scores)),
    )
