"""The best trials, for several objectives at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from raymerge.pipeline.curve.front import Costs, find_front
from raymerge.pipeline.search.study import Direction
from raymerge.pipeline.search.values import Values


def make_costs(values: Sequence[float], directions: Sequence[Direction]) -> Costs:
    """Return values of objectives as costs, of which smaller ones are better."""
    return tuple(
        -value if direction.is_maximised else value for value, direction in zip(values, directions, strict=True)
    )


def find_best(values: Mapping[str, Sequence[float] | None], directions: Sequence[Direction]) -> list[str]:
    """Return the names of the values that no other is better than, in the order given; of equal ones the first.

    >>> directions = [Direction("accuracy", is_maximised=True), Direction("tokens", is_maximised=False)]
    >>> find_best({"a": (0.5, 10.0), "b": (0.6, 9.0), "c": None, "d": (0.7, 20.0), "e": (0.6, 9.0)}, directions)
    ['b', 'd']
    """
    costs = {name: make_costs(own, directions) for name, own in values.items() if own is not None}
    first: dict[Costs, str] = {}
    for name, own in costs.items():
        first.setdefault(own, name)
    front = set(find_front({name: costs[name] for name in first.values()}))
    return [name for name in costs if name in front]


def judge_best(
    values: Mapping[str, Values | None],
    directions: Sequence[Direction],
    judge: Callable[[Sequence[str]], Mapping[str, Values | None]],
) -> dict[str, Values]:
    """Return the values of the best by a judge that is dearer than where `values` come from.

    Where some of the best fall behind by the judge, those that are best in their place are judged as well, until all of
    the best are.

    Args:
        values: of all, by the cheap judge.
        directions: which values are better.
        judge: returns values of those with these names; None where there are none.
    """
    known = dict(values)
    judged: set[str] = set()
    while fresh := [name for name in find_best(known, directions) if name not in judged]:
        known |= judge(fresh)
        judged |= {*fresh}
    return {name: own for name in find_best(known, directions) if (own := known[name]) is not None}
