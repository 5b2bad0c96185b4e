"""Phases: where the share of answers that think jumps along a series."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import sqrt

from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Score

STEEPNESS = 2.0
"""A step belongs to a jump if it is so many times as steep as an even change over the whole series."""
MIN_CHANGE = 0.3
"""A jump changes the share by at least as much."""
_Z = 1.959963984540054
"""Standard normal quantile of a 95% interval."""


@dataclass(frozen=True, slots=True)
class Jump:
    """Neighbouring points of a series between which the share of thinking answers jumps."""

    series: str
    path: str
    before: str
    """Name of the point where it begins."""
    after: str
    """Name of the point where it ends."""
    start: float
    """The parameter's value at the point before."""
    stop: float
    """The parameter's value at the point after."""
    share_before: float
    share_after: float


def find_jumps(series: Series, scores: Mapping[str, Score]) -> tuple[Jump, ...]:
    """Return the jumps of a series, in the order of the parameter.

    Let the shares be s_i at the values p_i, over the points that have one. A step from i to i+1 is steep if its slope
    is at least `STEEPNESS` times (max s - min s) / (p_n - p_0), the slope of an even change. Steep steps in a row and
    of one direction are one jump if together they change the share by `MIN_CHANGE`, and the 95% Wilson intervals of the
    shares at both ends, with the number of items as sample size, do not overlap. A share that changes evenly has no
    jump, and neither has a series of fewer than three points.
    """
    if not series.is_line:
        return ()
    known = _list_shares(series, scores)
    if len(known) < 3:
        return ()
    shares = [share for _, _, share in known]
    even = (max(shares) - min(shares)) / (known[-1][1] - known[0][1])
    found = []
    for first, last in _join_steps([_direct(left, right, even) for left, right in pairwise(known)]):
        (before, start, low), (after, stop, high) = known[first], known[last]
        if abs(high - low) >= MIN_CHANGE and not _overlap(
            wilson(low, scores[before].num_items), wilson(high, scores[after].num_items)
        ):
            found.append(Jump(series.name, series.path, before, after, start, stop, low, high))
    return tuple(found)


def wilson(share: float, count: int) -> tuple[float, float]:
    """Return the 95% Wilson score interval of a share.

    Source: Wilson 1927, Probable inference, the law of succession, and statistical inference, eq. 4.

    Args:
        share: from 0 to 1.
        count: sample size; with none, anything is possible.
    """
    if count < 1:
        return 0.0, 1.0
    scale = 1 + _Z**2 / count
    centre = (share + _Z**2 / (2 * count)) / scale
    half = _Z * sqrt(max(share * (1 - share), 0.0) / count + _Z**2 / (4 * count**2)) / scale
    return centre - half, centre + half


def _list_shares(series: Series, scores: Mapping[str, Score]) -> list[tuple[str, float, float]]:
    """Return name, parameter and share of the points that have one; of points at one value the first."""
    known: list[tuple[str, float, float]] = []
    for name, value in zip(series.points, series.values, strict=True):
        share = scores[name].thinking if name in scores else None
        if share is not None and (not known or value > known[-1][1]):
            known.append((name, value, share))
    return known


def _direct(left: tuple[str, float, float], right: tuple[str, float, float], even: float) -> int:
    """Return 1 for a step that is steep upwards, -1 for one that is steep downwards, else 0."""
    slope = (right[2] - left[2]) / (right[1] - left[1])
    if not slope or abs(slope) < STEEPNESS * even * (1 - 1e-9):  # steps of a grid differ by rounding
        return 0
    return 1 if slope > 0 else -1


def _join_steps(directions: list[int]) -> Iterator[tuple[int, int]]:
    """Yield the first and the last point of each run of steps with one direction."""
    first = 0
    for index, direction in enumerate(directions):
        if index and direction != directions[index - 1]:
            first = index
        if direction and (index + 1 == len(directions) or directions[index + 1] != direction):
            yield first, index + 1


def _overlap(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
