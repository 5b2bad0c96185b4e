"""Linear combinations: weighted sums of the inputs themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import loops, np, torch
from raymerge.ops.stored import LOOP_DTYPES, Slot, Stored

SMALLEST_SHARE = 1e-4
"""Weights that cancel to less than this share of their absolute sum would make values ten thousand times as large."""


def check_sum(weights: Sequence[float], switch: str) -> float:
    """Return the sum of weights, to divide by it.

    Raises:
        OpParameterError: they cancel.
    """
    total = sum(weights)
    if abs(total) <= SMALLEST_SHARE * sum(map(abs, weights)):
        raise OpParameterError(
            f"the weights {', '.join(map(str, weights))} sum to {total:g}, so they cannot be normalized; "
            f"change a weight or set {switch}: false"
        )
    return total


@dataclass(frozen=True)
class LinearCombination(Kernel):
    """y = sum(coefficients_i * x_i) / divisor, in config order."""

    family = "weighted sum"
    coefficients: tuple[float, ...]
    divisor: float = 1.0
    loop_dtypes = LOOP_DTYPES

    def num_scratch(self, site: Site) -> int:
        """One, to convert a source in."""
        return min(1, site.num_sources - 1)

    def measuring(self, site: Site) -> Hashable:
        """Nothing is measured."""
        return LinearCombination

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _LinearRun(self)


@dataclass(frozen=True)
class _LinearRun(KernelRun):
    kernel: LinearCombination

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, LinearCombination)
        return _LinearRun(kernel)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        combine_linearly(block, self.kernel.coefficients, out)
        if self.kernel.divisor != 1:  # as a tensor: by a number, GPUs multiply with the rounded reciprocal
            out.div_(torch.full((), self.kernel.divisor, dtype=out.dtype, device=out.device))

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        return combine_stored(stored, self.kernel.coefficients, out, self.kernel.divisor)


def combine_linearly(block: Block, coefficients: tuple[float, ...], out: torch.Tensor) -> None:
    """Write sum(coefficients_i * x_i) to `out`.

    Products and sums are rounded one after the other: a fused multiply-add would give other bits on other processors.
    """
    block.load(0, out)
    if coefficients[0] != 1:
        out.mul_(coefficients[0])
    for source, coefficient in enumerate(coefficients[1:], start=1):
        x = block.load(source, block.scratch[0])
        if coefficient != 1:
            x.mul_(coefficient)
        out.add_(x)


def combine_stored(stored: Stored, coefficients: tuple[float, ...], out: Slot, divisor: float = 1.0) -> float:
    """Round sum(coefficients_i * x_i) / divisor to `out`, of the first sources; see `KernelRun`."""
    words, longs, places, forms = stored.sources()
    factors = np.array(coefficients, np.float32)
    used = len(factors)
    where = np.float32(divisor), stored.start, stored.num_elements
    finished: float = loops.combine(
        words, longs, places[:used], forms[:used], factors, *where, *out.arguments(), loops.make_scratch(2)
    )
    return finished
