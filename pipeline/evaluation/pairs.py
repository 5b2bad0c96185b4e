"""Two models compared on the same items, which tells far more than two intervals of their own."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from statistics import fmean

from raymerge.pipeline.evaluation.figures import Z
from raymerge.pipeline.evaluation.results import Estimate
from raymerge.pipeline.evaluation.samples import Sample


@dataclass(frozen=True, slots=True)
class Comparison:
    """One model compared with another on the items that both have answered."""

    accuracy: Estimate
    """Difference of their accuracies (mean@k), from -1 to 1; above 0 where the first is better."""
    tokens: Estimate | None
    """Ratio of their mean tokens, below 1 where the first takes fewer; None where they were not counted."""
    num_items: int

    @property
    def is_told_apart(self) -> bool:
        """Whether the accuracies differ by more than chance would have it, at 95%."""
        return self.accuracy.low > 0 or self.accuracy.high < 0


def compare(one: Collection[Sample], other: Collection[Sample]) -> Comparison | None:
    """Return how the samples of one model compare with those of another; None without two items in common."""
    mine, its = _list_items(one), _list_items(other)
    items = sorted(mine.keys() & its.keys())
    if len(items) < 2:
        return None
    scores = [[_mean_score(samples[item]) for item in items] for samples in (mine, its)]
    tokens = [[_mean_tokens(samples[item]) for item in items] for samples in (mine, its)]
    return Comparison(
        estimate_difference([a - b for a, b in zip(*scores, strict=True)]),
        estimate_ratio(
            [each for each in tokens[0] if each is not None], [each for each in tokens[1] if each is not None]
        )
        if all(None not in each for each in tokens)
        else None,
        len(items),
    )


def estimate_difference(differences: Sequence[float]) -> Estimate:
    """Return the mean of differences of items, with an interval for a population of items.

    The standard error is that over items: the samples of one are not independent, and what makes an item easy for both
    models cancels. Differences within [-1, 1] get the interval of two items more, whose differences add up to 0 and
    their squares to 1: it has a width also where no item differs.

    Source: paired differences, clustered by question: Miller 2024, arXiv:2411.00640, section 4.2; the adjustment:
    Agresti and Min 2005, Statistics in Medicine 24:729, who add 1/2 to each cell of two matched shares.

    >>> found = estimate_difference([0.0] * 98 + [1.0, 1.0])
    >>> round(found.mean, 3), round(found.low, 3), round(found.high, 3)
    (0.02, -0.013, 0.053)
    """
    num, mean = len(differences), fmean(differences)
    if max(map(abs, differences)) > 1:
        half = Z * math.sqrt(math.fsum((each - mean) ** 2 for each in differences) / (num * max(num - 1, 1)))
        return Estimate(mean, mean - half, mean + half)
    centre = math.fsum(differences) / (num + 2)
    square = (math.fsum(each**2 for each in differences) + 1) / (num + 2)
    half = Z * math.sqrt(max(0.0, square - centre**2) / (num + 2))
    return Estimate(mean, max(-1.0, min(mean, centre - half)), min(1.0, max(mean, centre + half)))


def estimate_ratio(ones: Sequence[float], others: Sequence[float]) -> Estimate | None:
    """Return the ratio of two sums over the same items, with its interval; None where the second is 0.

    Source: Cochran 1977, Sampling Techniques, section 6.4: the variance of a ratio, linearised.

    >>> estimate_ratio([1, 2, 3], [2, 4, 6])
    Estimate(mean=0.5, low=0.5, high=0.5)
    """
    total = math.fsum(others)
    if not total:
        return None
    ratio, num = math.fsum(ones) / total, len(ones)
    squares = math.fsum((one - ratio * other) ** 2 for one, other in zip(ones, others, strict=True))
    half = Z * math.sqrt(squares * num / max(num - 1, 1)) / total
    return Estimate(ratio, max(0.0, ratio - half), ratio + half)


def average(comparisons: Sequence[Comparison]) -> Comparison:
    """Return the unweighted mean of comparisons in several tasks, whose items are independent samples."""
    ratios = [each.tokens for each in comparisons if each.tokens is not None]
    return Comparison(
        _average([each.accuracy for each in comparisons]),
        _average(ratios) if len(ratios) == len(comparisons) == 1 else None,
        sum(each.num_items for each in comparisons),
    )


def _average(estimates: Sequence[Estimate]) -> Estimate:
    mean = fmean(each.mean for each in estimates)
    below = math.sqrt(math.fsum((each.mean - each.low) ** 2 for each in estimates)) / len(estimates)
    above = math.sqrt(math.fsum((each.high - each.mean) ** 2 for each in estimates)) / len(estimates)
    return Estimate(mean, mean - below, mean + above)


def _list_items(samples: Collection[Sample]) -> dict[str, list[Sample]]:
    """Return the samples with a score by item."""
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.score is not None:
            found.setdefault(sample.item, []).append(sample)
    return found


def _mean_score(samples: Sequence[Sample]) -> float:
    return fmean(sample.score or 0.0 for sample in samples)


def _mean_tokens(samples: Sequence[Sample]) -> float | None:
    counts = [sample.tokens for sample in samples if sample.tokens is not None]
    return fmean(counts) if len(counts) == len(samples) else None
