from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.curve.phases import MIN_CHANGE, STEEPNESS, Jump, find_jumps, wilson
from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Score


def find(shares: Sequence[float | None], num_items: int = 500, values: Sequence[float] = ()) -> list[tuple[int, int]]:
    """Return the points before and after each jump."""
    names = [str(index) for index in range(len(shares))]
    series = Series("", "t", tuple(names), tuple(values or map(float, range(len(shares)))), is_line=True)
    scores = {name: Score(thinking=share, num_items=num_items) for name, share in zip(names, shares, strict=True)}
    return [(int(jump.before), int(jump.after)) for jump in find_jumps(series, scores)]


@pytest.mark.parametrize(
    ("shares", "jumps"),
    [
        pytest.param([0, 0, 0, 1, 1, 1], [(2, 3)], id="at once"),
        pytest.param([0, 0.01, 0.05, 0.5, 0.95, 1, 1, 1, 1], [(2, 4)], id="steps in a row are one jump"),
        pytest.param([1, 1, 1, 0.1, 0, 0], [(2, 3)], id="downwards"),
        pytest.param([0, 0, 0.9, 0.9, 0.1, 0.1, 0.1], [(1, 2), (3, 4)], id="up and down"),
        pytest.param([0, 0.2, 0.4, 0.6, 0.8, 1], [], id="evenly"),
        pytest.param([0, 0, 0, 0.2, 0.2, 0.2], [], id="too little"),
        pytest.param([0.5] * 5, [], id="none"),
        pytest.param([0, 1], [], id="two points"),
        pytest.param([], [], id="no points"),
        pytest.param([0, 0, None, 1, 1, 1], [(1, 3)], id="a point without a share"),
    ],
)
def test_jumps(shares: Sequence[float | None], jumps: list[tuple[int, int]]) -> None:
    assert find(shares) == jumps


def test_the_slope_counts_and_not_the_step() -> None:
    assert find([0, 0.5, 0.55, 0.6], values=[0, 5, 5.5, 6]) == []


def test_few_items_show_no_jump() -> None:
    shares = [0, 0, 0, 0.4, 0.4, 0.4]
    assert find(shares, num_items=200) == [(2, 3)]
    assert find(shares, num_items=5) == []


def test_points_that_are_not_joined_have_no_jump() -> None:
    series = Series("", "t", ("a", "b", "c"), (0.0, 1.0, 2.0), is_line=False)
    assert (
        find_jumps(
            series, {name: Score(thinking=share, num_items=99) for name, share in zip("abc", (0, 0, 1), strict=True)}
        )
        == ()
    )


def test_a_jump_says_where_it_is() -> None:
    series = Series("density = 0.5", "t", ("a", "b", "c"), (0.1, 0.2, 0.3), is_line=True)
    scores = {name: Score(thinking=share, num_items=99) for name, share in zip("abc", (0.0, 0.0, 1.0), strict=True)}
    assert find_jumps(series, scores) == (Jump("density = 0.5", "t", "b", "c", 0.2, 0.3, 0.0, 1.0),)


@given(st.lists(st.floats(0, 1), min_size=3, max_size=12))
def test_jumps_are_the_runs_of_steep_steps(shares: list[float]) -> None:
    even = (max(shares) - min(shares)) / (len(shares) - 1)
    found = find(shares, num_items=10**9)
    for first, last in found:
        steps = [right - left for left, right in pairwise(shares[first : last + 1])]
        assert all(abs(step) >= STEEPNESS * even * (1 - 1e-6) and step * steps[0] > 0 for step in steps)
        assert abs(shares[last] - shares[first]) >= MIN_CHANGE
    covered = {index for first, last in found for index in range(first, last)}
    steep = max(range(len(shares) - 1), key=lambda index: abs(shares[index + 1] - shares[index]))
    largest = abs(shares[steep + 1] - shares[steep])
    if largest >= max(MIN_CHANGE, STEEPNESS * even * (1 + 1e-6)):
        assert steep in covered


def test_wilson_as_in_tables() -> None:
    # Agresti and Coull 1998: 0 and 5 of 10 at 95%
    assert wilson(0.0, 10) == pytest.approx((0.0, 0.2775), abs=5e-4)
    assert wilson(0.5, 10) == pytest.approx((0.2366, 0.7634), abs=5e-4)
    assert wilson(0.5, 0) == (0.0, 1.0)
