"""Deltas whose elements are weighted by scores: of their size in a model, and of the models' agreement."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.divergence import write_exponentials
from raymerge.ops.kernels.sparsifiers.select import CUT_NBYTES, SELECTION_TEMPORARY_NBYTES, MagnitudeSparsifier
from raymerge.ops.lazy import torch

CUT_OFF = 1e-4
"""Share of each delta's elements at either end whose size is cut off."""
_SMALL = 0.25
"""Below it, tanh(x) comes from its continued fraction, which is right to 13 digits there."""
_STRIP_ELEMENTS = 2**14
_STRIP_NBYTES = 8 * 8
"""For each element of a strip: what a score is computed in, in float64."""


@dataclass(frozen=True)
class CompetingDeltas(Kernel):
    """y = base + scale * sum(v_i t_i) / sum(v_i), with the deltas t_i and their elements' weights v_i."""

    densities: tuple[float, ...]
    """Share of each model's elements that have a weight."""
    scale: float = 1.0

    family = "deltas"

    def num_passes(self, site: Site) -> int:
        """Two for the order statistics of sizes, and two for those of scores, which need them."""
        return 4 if any(self.densities) else 0

    def num_scratch(self, site: Site) -> int:
        """The base, the sum of all deltas, a delta, its scores, and two spares."""
        return 6

    def state_nbytes(self, site: Site) -> int:
        """Counts of sizes at both ends for each model, or of scores at one, and strips in float64."""
        num_models = site.num_sources - 1
        return 3 * num_models * CUT_NBYTES + SELECTION_TEMPORARY_NBYTES + _STRIP_ELEMENTS * _STRIP_NBYTES

    def measuring(self, site: Site) -> Hashable:
        """Return all but the scale."""
        return CompetingDeltas, self.densities

    def start(self, site: Site) -> KernelRun:
        """Begin without order statistics."""
        return _CompetingRun(self, site)


class _CompetingRun(KernelRun):
    def __init__(self, kernel: CompetingDeltas, site: Site) -> None:
        self.kernel = kernel
        self._models = range(1, site.num_sources)
        num_elements = site.num_elements
        lowest, highest = int(num_elements * CUT_OFF), max(0, int(num_elements * (1 - CUT_OFF) - 1))
        num_above = max(0, num_elements - highest - 1)
        self._sizes = [MagnitudeSparsifier(num_elements - lowest - num_above, num_above) for _ in self._models]
        num_kept = [num_elements - int(num_elements * (1 - density)) for density in kernel.densities]
        self._scores = [MagnitudeSparsifier(max(1, number)) for number in num_kept]
        self._ends: list[tuple[float, float]] = []
        """The lower and the upper threshold of the sizes of each model's delta."""
        self._thresholds: list[float] = []
        self._highest = [0.0 for _ in self._models]
        """Scores of each model."""

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, CompetingDeltas)
        run = copy.copy(self)
        run.kernel = kernel
        return run

    def figures(self) -> Mapping[str, float]:
        return {f"threshold[{k}]": value for k, value in enumerate(self._thresholds)}

    def measure(self, index: int, block: Block) -> None:
        base, _, delta, *_, one, other = block.scratch
        if index < 2:
            block.load(0, base)
            for model, sizes in zip(self._models, self._sizes, strict=True):
                sizes.measure(index, block.load(model, delta).sub_(base), (one, other))
            return
        for k, scores in self._score(block):
            self._highest[k] = max(self._highest[k], scores.max().item())
            self._scores[k].measure(index - 2, scores, (one, other))

    def end_pass(self, index: int) -> None:
        for each in self._sizes if index < 2 else self._scores:
            each.end_pass(index % 2)
        if index == 1:
            found = [sizes.figures() for sizes in self._sizes]
            self._ends = [(each["threshold"], each.get("upper_threshold", each["threshold"])) for each in found]
            self._sizes = []
        if index == 3:
            self._thresholds = [scores.figures()["threshold"] for scores in self._scores]
            self._scores = []

    def combine(self, block: Block, out: torch.Tensor) -> None:
        if not any(self.kernel.densities):
            block.load(0, out)
            return
        base, _, delta, _, total, _ = block.scratch
        out.zero_()
        total.zero_()
        for k, scores in self._score(block):
            if not self.kernel.densities[k]:
                continue
            low, high = self._ends[k]
            reach = self._highest[k] - self._thresholds[k]
            weights = scores.sub_(self._thresholds[k])
            weights = weights.clamp_(min=0).div_(reach) if reach > 0 else weights.ge_(0)
            total.add_(weights)
            is_negative = weights.copysign_(delta)  # the weight with the sign of the delta
            out.add_(delta.abs_().clamp_(low, high).mul_(is_negative))
        out.div_(total.clamp_(min=1e-12)).mul_(self.kernel.scale).add_(base)

    def _score(self, block: Block) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each model's position and the scores of its delta, which is in its place of the scratch meanwhile."""
        base, total, delta, scores, *_ = block.scratch
        block.load(0, base)
        total.zero_()
        for model in self._models:
            total.add_(block.load(model, delta).sub_(base))
        for k, model in enumerate(self._models):
            block.load(model, delta).sub_(base)
            for start in range(0, len(delta), _STRIP_ELEMENTS):
                strip = slice(start, start + _STRIP_ELEMENTS)
                scores[strip] = _find_scores(delta[strip], total[strip], *self._ends[k], len(self._models))
            yield k, scores


def _find_scores(delta: torch.Tensor, total: torch.Tensor, low: float, high: float, num_models: int) -> torch.Tensor:
    """Return exp(n (z^2 - 1)) tanh(delta * total) where that is positive, else 0; z is the size from low to high."""
    sizes = delta.double().abs_().clamp_(low, high).sub_(low).div_(high - low if high > low else 1)
    exponents = sizes.mul_(sizes).sub_(1).mul_(num_models)
    scores = write_exponentials(exponents, torch.empty_like(exponents))
    return scores.mul_(_find_tanh(delta.double().mul_(total))).clamp_(min=0)


def _find_tanh(x: torch.Tensor) -> torch.Tensor:
    """Return tanh(x), the same on every processor."""
    powers = write_exponentials(x.abs().mul_(-2), torch.empty_like(x))
    large = torch.sub(1, powers).div_(powers.add_(1)).copysign_(x)
    square = x * x
    small = (square * 21 + 1260).mul_(square).add_(10395).mul_(x)
    small.div_((square + 210).mul_(square).add_(4725).mul_(square).add_(10395))
    return torch.where(square < _SMALL**2, small, large)
