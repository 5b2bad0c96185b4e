"""The Pareto front: what nothing else matches in one objective without losing in another."""

from __future__ import annotations

from collections.abc import Mapping

Costs = tuple[float, ...]
"""A number for each objective, such as (tokens, -accuracy): smaller ones are better."""


def find_front(costs: Mapping[str, Costs]) -> tuple[str, ...]:
    """Return the models that none dominates, in the order of their costs; equal ones are all there.

    >>> find_front({"a": (10, -0.5), "b": (20, -0.5), "c": (30, -0.9), "d": (10, -0.5)})
    ('a', 'd', 'c')
    """
    front: list[str] = []
    for name in sorted(costs, key=costs.__getitem__):  # one that dominates comes before what it dominates
        if not any(dominates(costs[other], costs[name]) for other in front):
            front.append(name)
    return tuple(front)


def find_dominators(name: str, costs: Mapping[str, Costs]) -> tuple[str, ...]:
    """Return the models that dominate this one, in the order of their costs.

    >>> find_dominators("b", {"a": (10, -0.5), "b": (20, -0.5), "c": (15, -0.9)})
    ('a', 'c')
    """
    better = [other for other in costs if dominates(costs[other], costs[name])]
    return tuple(sorted(better, key=costs.__getitem__))


def dominates(one: Costs, other: Costs) -> bool:
    """Tell whether one is at least as good in each objective, and better in one.

    >>> dominates((10, -0.5), (20, -0.5)), dominates((10, -0.5), (20, -0.6)), dominates((10, -0.5), (10, -0.5))
    (True, False, False)
    """
    return one != other and all(mine <= its for mine, its in zip(one, other, strict=True))
