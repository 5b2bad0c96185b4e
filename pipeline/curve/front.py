"""The Pareto front: models that no other one matches with fewer tokens."""

from __future__ import annotations

from collections.abc import Mapping

Costs = Mapping[str, tuple[float, float]]
"""(tokens, quality) by model: fewer tokens are better, and more quality."""


def find_front(costs: Costs) -> tuple[str, ...]:
    """Return the models that none dominates, by tokens; equal ones are all there.

    >>> find_front({"a": (10, 0.5), "b": (20, 0.5), "c": (30, 0.9), "d": (10, 0.5)})
    ('a', 'd', 'c')
    """
    front: list[str] = []
    best = (float("inf"), float("-inf"))
    for name in sorted(costs, key=lambda name: (costs[name][0], -costs[name][1])):
        if costs[name][1] > best[1]:
            best = costs[name]
        if costs[name] == best:
            front.append(name)
    return tuple(front)


def find_dominators(name: str, costs: Costs) -> tuple[str, ...]:
    """Return the models that are at least as good as this one in both, and better in one, by tokens.

    >>> find_dominators("b", {"a": (10, 0.5), "b": (20, 0.5), "c": (15, 0.9)})
    ('a', 'c')
    """
    tokens, quality = costs[name]
    better = [
        other
        for other, (its_tokens, its_quality) in costs.items()
        if its_tokens <= tokens and its_quality >= quality and (its_tokens, its_quality) != (tokens, quality)
    ]
    return tuple(sorted(better, key=lambda other: (costs[other][0], -costs[other][1])))
