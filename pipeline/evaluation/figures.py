"""Figures of an evaluation from its samples: accuracy with its confidence interval, tokens, shares."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from raymerge.pipeline.evaluation.results import Estimate, Tokens
from raymerge.pipeline.evaluation.samples import Sample

Z = 1.959963984540054
"""Quantile of the normal distribution for an interval of 95%."""


@dataclass(frozen=True, slots=True)
class Figures:
    """The figures of an evaluation."""

    num_items: int
    num_samples: int
    """Samples of each item."""
    accuracy: Estimate | None = None
    tokens: Tokens | None = None
    loss: Estimate | None = None
    thinking: float | None = None
    cut_off: float | None = None
    other: Mapping[str, float] = field(default_factory=dict)


def summarise(samples: Collection[Sample]) -> Figures:
    """Return the figures of answers to the items of a task; items without a score count where none has one."""
    by_item: dict[str, list[float]] = {}
    for sample in samples:
        if sample.score is not None:
            by_item.setdefault(sample.item, []).append(sample.score)
    scores = list(by_item.values())
    counts: dict[str, list[int]] = {}
    for sample in samples:
        if sample.tokens is not None:
            counts.setdefault(sample.item, []).append(sample.tokens)
    num_samples = max((len(each) for each in scores), default=0)
    return Figures(
        num_items=len(scores) or len({sample.item for sample in samples}),
        num_samples=num_samples,
        accuracy=estimate_accuracy(scores) if scores else None,
        tokens=measure_tokens(list(counts.values())) if counts else None,
        thinking=_share(sample.thinking for sample in samples),
        cut_off=_share(sample.cut_off for sample in samples),
        other=measure_pass(scores),
    )


def estimate_accuracy(scores: Sequence[Sequence[float]]) -> Estimate:
    """Return mean@k: the mean over items of the mean over their samples, with an interval for a population of items.

    It is Wilson's interval with an effective number of trials n' = p (1 - p) / SE², where SE is the standard error of
    the mean over items, clustered by item; n' is at least the number of items n and at most that of samples. With one
    sample of each item it is Wilson's interval of n trials. Scores outside of [0, 1] get the interval p ± z SE.

    Source: Wilson 1927; standard errors clustered by question: Miller 2024, arXiv:2411.00640, section 2.2; effective
    number of trials in Wilson's interval: Korn and Graubard 1998, Brown, Cai and DasGupta 2001.

    >>> round(estimate_accuracy([[1.0]] * 8 + [[0.0]] * 2).low, 4)
    0.4902
    """
    means = [fmean(each) for each in scores]
    mean, num_items = fmean(means), len(means)
    variance = fmean((each - mean) ** 2 for each in means)
    if not all(0 <= score <= 1 for each in scores for score in each):
        half = Z * math.sqrt(variance / max(num_items - 1, 1))
        return Estimate(mean, mean - half, mean + half)
    num_samples = sum(map(len, scores))
    spread = mean * (1 - mean)
    if not spread:  # nothing tells how alike the samples of an item are
        return _wilson(mean, num_items)
    trials = min(num_items * spread / variance, num_samples) if variance > 0 else num_samples
    return _wilson(mean, max(trials, num_items))


def _wilson(share: float, trials: float) -> Estimate:
    centre = (share + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(share * (1 - share) / trials + Z**2 / (4 * trials**2))
    return Estimate(share, max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half)))


def measure_pass(scores: Sequence[Sequence[float]]) -> dict[str, float]:
    """Return pass@k for k = 2, 4, 8 ... and the number of samples: the chance that one of k is right.

    Source: Chen et al. 2021, arXiv:2107.03374, equation 1: the mean over items of 1 - C(n - c, k) / C(n, k).

    >>> measure_pass([[1.0, 0.0], [0.0, 0.0]])
    {'pass@2': 0.5}
    """
    num = min(map(len, scores), default=0)
    sizes = sorted({2**power for power in range(1, num.bit_length())} | {num}) if num > 1 else []
    return {
        f"pass@{k}": fmean(
            1 - math.comb(len(each) - sum(score >= 1 for score in each), k) / math.comb(len(each), k) for each in scores
        )
        for k in sizes
    }


def measure_tokens(counts: Sequence[Sequence[int]]) -> Tokens:
    """Return mean, median and 95th percentile, interpolated linearly, and the interval of the mean.

    The mean is that of all samples. The standard error is clustered by item, as in `estimate_accuracy`; there is no
    interval with one item.

    Args:
        counts: of each item, those of its samples.

    >>> measure_tokens([[1, 2], [3, 10]])
    Tokens(mean=4.0, median=2.5, p95=8.95, low=0.0, high=8.9)
    """
    ordered = sorted(count for each in counts for count in each)
    mean, num = fmean(ordered), len(counts)
    low = high = None
    if num > 1:  # a ratio of sums over items, linearised
        squares = math.fsum((sum(each) - mean * len(each)) ** 2 for each in counts)
        half = Z * math.sqrt(squares * num / (num - 1)) / len(ordered)
        low, high = round(max(0.0, mean - half), 3), round(mean + half, 3)
    return Tokens(mean, _quantile(ordered, 0.5), round(_quantile(ordered, 0.95), 9), low, high)


def estimate_loss(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Return nats per token, with the interval of a ratio of sums over windows.

    Source: Cochran 1977, Sampling Techniques, section 6.4: the variance of a ratio, linearised.

    Args:
        sums: negative log-likelihood of each window.
        counts: predicted tokens of each.
    """
    mean = math.fsum(sums) / sum(counts)
    num = len(sums)
    squares = math.fsum((total - mean * count) ** 2 for total, count in zip(sums, counts, strict=True))
    half = Z * math.sqrt(squares * num / max(num - 1, 1)) / sum(counts)
    return Estimate(mean, mean - half, mean + half)


def _quantile(ordered: Sequence[int], share: float) -> float:
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (place - below) * (ordered[above] - ordered[below])


def _share(flags: Iterable[bool | None]) -> float | None:
    known = [flag for flag in flags if flag is not None]
    return sum(known) / len(known) if known else None
