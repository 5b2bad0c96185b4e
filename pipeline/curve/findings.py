"""Findings of a view: the Pareto front, dominated parents, and phases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from raymerge.pipeline.curve.front import find_dominators, find_front
from raymerge.pipeline.curve.pairs import Pairs
from raymerge.pipeline.curve.phases import Jump, find_jumps
from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Model, View
from raymerge.pipeline.evaluation.pairs import Comparison


@dataclass(frozen=True, slots=True)
class Findings:
    """Findings from the scores of one view."""

    front: tuple[str, ...]
    """Points and parents that no other one matches with fewer tokens, by tokens; empty where no tokens were counted."""
    dominators: Mapping[str, tuple[str, ...]]
    """For each parent with accuracy and tokens the points that are as good or better in both, by tokens."""
    jumps: tuple[Jump, ...]
    comparisons: Mapping[str, Comparison] = field(default_factory=dict)
    """By parent: the first point that dominates it, compared with it on the same items if their samples are kept."""


def find(view: View, models: Sequence[Model], series: Sequence[Series], pairs: Pairs | None = None) -> Findings:
    """Return what a view shows. Models that are neither points nor parents do not count."""
    pairs = pairs or Pairs()
    kinds = {model.name: model.kind for model in models}
    costs = {name: cost for name, cost in view.costs().items() if kinds[name] != "other"}
    points = {name: cost for name, cost in costs.items() if kinds[name] == "point"}
    dominators = {
        name: find_dominators(name, {**points, name: cost}) for name, cost in costs.items() if kinds[name] == "parent"
    }
    compared = {name: pairs.compare(view, found[0], name) for name, found in dominators.items() if found}
    return Findings(
        find_front(costs),
        dominators,
        tuple(jump for line in series for jump in find_jumps(line, view.scores)),
        {name: each for name, each in compared.items() if each is not None},
    )
