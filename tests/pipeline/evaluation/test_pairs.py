"""Two models on the same items: the difference and its interval."""

from __future__ import annotations

import random

import pytest

from raymerge.pipeline.evaluation.figures import estimate_accuracy
from raymerge.pipeline.evaluation.pairs import average, compare, estimate_difference, estimate_ratio
from raymerge.pipeline.evaluation.samples import Sample


def answer(scores: list[list[float]], tokens: list[int | None]) -> list[Sample]:
    """Return samples of items, each with as many tokens as is said of its item."""
    return [
        Sample(str(item), k, score, tokens=count)
        for item, (each, count) in enumerate(zip(scores, tokens, strict=True))
        for k, score in enumerate(each)
    ]


def test_items_that_both_have_answered_are_compared() -> None:
    one = answer([[1, 1], [1, 0], [0, 0], [1, 1]], [10, 20, 30, 40])
    other = answer([[1, 0], [1, 1], [0, 0]], [20, 40, 60])
    found = compare(one, other)
    assert found is not None
    assert found.num_items == 3
    assert found.accuracy.mean == pytest.approx((0.5 - 0.5 + 0) / 3)
    assert found.tokens is not None
    assert (found.tokens.mean, found.tokens.low, found.tokens.high) == (0.5, 0.5, 0.5)
    assert not found.is_told_apart
    assert compare(one, answer([[1]], [3])) is None
    uncounted = compare(one, answer([[1], [0]], [3, None]))
    assert uncounted is not None
    assert uncounted.tokens is None


def test_a_difference_that_two_intervals_hide_is_seen() -> None:
    """One model is right on 12 items of 200 more, and wrong on none that the other has right."""
    mine, its = [[1.0]] * 112 + [[0.0]] * 88, [[1.0]] * 100 + [[0.0]] * 100
    assert estimate_accuracy(mine).low < estimate_accuracy(its).high
    found = compare(answer(mine, [1] * 200), answer(its, [1] * 200))
    assert found is not None
    assert found.is_told_apart
    assert 0.02 < found.accuracy.low < 0.06 < found.accuracy.high < 0.1


@pytest.mark.parametrize(("num_items", "both"), [(30, 0.5), (60, 0.9), (200, 0.97)])
def test_intervals_hold_the_difference_nineteen_times_in_twenty(num_items: int, both: float) -> None:
    """Items are right for both, for one, for the other or for none; also where nearly all are right for both."""
    numbers = random.Random(num_items)
    differences, weights = (0.0, 1.0, -1.0), (both, 0.7 * (1 - both), 0.3 * (1 - both))
    truth = weights[1] - weights[2]
    found = [estimate_difference(numbers.choices(differences, weights, k=num_items)) for _ in range(500)]
    assert 0.92 < sum(each.low <= truth <= each.high for each in found) / 500 < 0.995


def test_equal_answers_leave_a_doubt_that_shrinks_with_items() -> None:
    widths = [estimate_difference([0.0] * num).high for num in (10, 100, 1000)]
    assert 0.1 < widths[0] < 0.2
    assert 0.01 < widths[1] < 0.03
    assert widths[2] < 0.003
    assert estimate_difference([2.0, 4.0, 3.0]).mean == 3.0


def test_a_ratio_of_tokens() -> None:
    found = estimate_ratio([10.0, 30.0, 20.0], [20.0, 40.0, 60.0])
    assert found is not None
    assert found.low < found.mean == 0.5 < found.high
    assert estimate_ratio([1.0, 2.0], [0.0, 0.0]) is None


def test_the_mean_over_tasks_is_narrower_than_each() -> None:
    one, other = answer([[1.0], [0.0]] * 20, [1] * 40), answer([[0.0], [0.0]] * 20, [2] * 40)
    found = compare(one, other)
    assert found is not None
    mean = average([found, found])
    assert (mean.accuracy.mean, mean.num_items) == (found.accuracy.mean, 80)
    assert found.accuracy.low < mean.accuracy.low < mean.accuracy.high < found.accuracy.high
