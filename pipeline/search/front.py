"""Which of many values are best, for several objectives at once."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.search.study import Direction


def find_front(values: Sequence[Sequence[float] | None], directions: Sequence[Direction]) -> list[int]:
    """Return the positions of the values that no other is better than, in order; of equal ones the first.

    >>> directions = [Direction("accuracy", is_maximised=True), Direction("tokens", is_maximised=False)]
    >>> find_front([(0.5, 10.0), (0.6, 9.0), None, (0.7, 20.0), (0.6, 9.0)], directions)
    [1, 3]
    """
    costs = [None if each is None else _make_costs(each, directions) for each in values]
    return [
        k
        for k, own in enumerate(costs)
        if own is not None
        and not any(
            other is not None and _is_dominated(own, other, other_is_first=j < k) for j, other in enumerate(costs)
        )
    ]


def _make_costs(values: Sequence[float], directions: Sequence[Direction]) -> tuple[float, ...]:
    return tuple(
        -value if direction.is_maximised else value for value, direction in zip(values, directions, strict=True)
    )


def _is_dominated(own: tuple[float, ...], other: tuple[float, ...], *, other_is_first: bool) -> bool:
    if own == other:
        return other_is_first
    return all(theirs <= mine for theirs, mine in zip(other, own, strict=True))
