"""Linear combinations: weighted sums of the inputs themselves."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import np, sum_loops, torch
from raymerge.ops.stored import LOOP_DTYPES, Slot, Stored, find_slots

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
        [finished] = self.combine_outputs([self], stored, [out])
        return finished

    def combine_outputs(self, runs: Sequence[KernelRun], stored: Stored, outs: Sequence[Slot]) -> Sequence[float]:
        kernels = [run.kernel for run in runs if isinstance(run, _LinearRun)]
        if len(kernels) < len(runs) or len({len(kernel.coefficients) for kernel in kernels}) > 1:
            return super().combine_outputs(runs, stored, outs)
        rows = [kernel.coefficients for kernel in kernels]
        return combine_stored(stored, rows, outs, [kernel.divisor for kernel in kernels])


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


def combine_stored(
    stored: Stored, coefficients: Sequence[tuple[float, ...]], outs: Sequence[Slot], divisors: Sequence[float]
) -> Sequence[float]:
    """Round sum(coefficients_i * x_i) / divisor to each slot, of the first sources; see `KernelRun.combine_outputs`."""
    words, longs, places, forms = stored.sources()
    factors = np.array(coefficients, np.float32)
    num_outputs, used = factors.shape
    squares = outs[0].squares[None] if num_outputs == 1 else np.array([out.squares for out in outs])
    finished = np.zeros(num_outputs)
    scratch = sum_loops.make_scratch(sum_loops.NUM_DECODED + (num_outputs if used > sum_loops.NUM_DECODED else 1))
    where = np.array(divisors, np.float32), stored.start, stored.num_elements
    sums = squares, finished, scratch
    sum_loops.combine(words, longs, places[:used], forms[:used], factors, *where, *find_slots(outs), *sums)
    for out, left in zip(outs, squares, strict=True) if num_outputs > 1 else ():
        out.squares[:] = left
    return finished.tolist()
