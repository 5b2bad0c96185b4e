from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from raymerge.pipeline.evaluation.figures import (
    Z,
    estimate_accuracy,
    estimate_loss,
    measure_pass,
    measure_tokens,
    summarise,
)
from raymerge.pipeline.evaluation.results import Estimate
from raymerge.pipeline.evaluation.samples import Sample


@pytest.mark.parametrize(("right", "num"), [(0, 7), (3, 7), (7, 7), (40, 100)])
def test_with_one_sample_each_the_interval_is_wilsons(right: int, num: int) -> None:
    """Its bounds are the shares p for which the one that was found is z standard errors away."""
    found = estimate_accuracy([[1.0]] * right + [[0.0]] * (num - right))
    share = right / num
    assert found.mean == share
    for bound in (found.low, found.high):
        if bound not in (0.0, 1.0):
            assert abs(bound - share) == pytest.approx(Z * (bound * (1 - bound) / num) ** 0.5)
    assert (found.low == 0) == (right == 0)
    assert (found.high == 1) == (right == num)


def test_samples_of_an_item_that_agree_count_once_and_independent_ones_each() -> None:
    alike = estimate_accuracy([[1.0] * 8] * 10 + [[0.0] * 8] * 10)
    once = estimate_accuracy([[1.0]] * 10 + [[0.0]] * 10)
    assert (alike.low, alike.high) == pytest.approx((once.low, once.high))
    mixed = estimate_accuracy([[1.0, 0.0] * 4] * 20)
    each = estimate_accuracy([[1.0]] * 80 + [[0.0]] * 80)
    assert (mixed.low, mixed.high) == pytest.approx((each.low, each.high))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    num_covered = 0
    for _ in range(1000):
        chances = random.beta(2, 3, size=60)
        scores = (random.random((60, 4)) < chances[:, None]).astype(float)
        found = estimate_accuracy(scores.tolist())
        num_covered += found.low <= 0.4 <= found.high
    assert 930 <= num_covered <= 970


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    scores = [[1.0, 0, 0, 0, 0], [1.0, 1.0, 1.0, 0, 0], [0.0] * 5]
    for name, value in measure_pass(scores).items():
        k = int(name.removeprefix("pass@"))
        shares = [np.mean([any(subset) for subset in combinations(each, k)]) for each in scores]
        assert value == pytest.approx(np.mean(shares))
    assert list(measure_pass(scores)) == ["pass@2", "pass@4", "pass@5"]


def test_quantiles_are_numpys() -> None:
    counts = np.random.default_rng(1).integers(0, 4000, 77).tolist()
    found = measure_tokens([[count] for count in counts])
    expected = [np.mean(counts), np.median(counts), np.quantile(counts, 0.95)]
    assert [found.mean, found.median, found.p95] == pytest.approx(expected)
    half = 1.96 * np.std(counts, ddof=1) / math.sqrt(77)
    assert [found.low, found.high] == pytest.approx([found.mean - half, found.mean + half], abs=0.1)
    alike = measure_tokens([[count] * 4 for count in counts])
    assert [alike.low, alike.high] == pytest.approx([found.low, found.high], abs=0.01), "equal samples tell nothing"
    assert measure_tokens([[3, 5]]).low is None


def test_loss_is_per_token_whatever_the_windows() -> None:
    found = estimate_loss([10.0, 4.0], [5, 1])
    assert found.mean == pytest.approx(14 / 6)
    same = estimate_loss([2.0, 2.0], [1, 1])
    assert same == Estimate(2.0, 2.0, 2.0)


def test_figures_of_samples() -> None:
    samples = [
        Sample("a", 0, 1.0, 10, True, False),
        Sample("a", 1, 0.0, 20, False, True),
        Sample("b", 0, 1.0, 30, True, False),
        Sample("b", 1, 1.0, 40, True, False),
    ]
    found = summarise(samples)
    assert (found.num_items, found.num_samples) == (2, 2)
    assert found.accuracy
    assert found.accuracy.mean == 0.75
    assert found.tokens
    assert found.tokens.median == 25
    assert (found.thinking, found.cut_off) == (0.75, 0.25)
    assert found.other == {"pass@2": 1.0}
    assert summarise([*samples, Sample("c", 0, None, 50)]).num_items == 2, "one without a score"
    assert summarise([Sample("c", 0, None, 50)]).num_items == 1
