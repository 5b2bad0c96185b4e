"""Spherical interpolation between a base and one model."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site, count_blocks
from raymerge.ops.kernels.linear import combine_linearly, combine_stored
from raymerge.ops.lazy import loops, np, torch
from raymerge.ops.registry import Base, merge_op
from raymerge.ops.stored import LOOP_DTYPES, PIECE_ELEMENTS, RunAll, Slot, Stored
from raymerge.ops.sums import add_blocks

SMALLEST_NORM = 1e-8
"""A vector that is no longer than this counts as a unit vector."""
PARALLEL = 0.9995
"""Above this cosine, in size, the arc counts as its chord."""


@merge_op(
    title="SLERP", base=Base.REQUIRED, reference="https://en.wikipedia.org/wiki/Slerp", min_models=1, max_models=1
)
def slerp(t: float) -> Kernel:
    """Spherical interpolation: t = 0 gives the base, t = 1 the other model.

    Source: Shoemake 1985, "Animating rotation with quaternion curves", section 3.3, with the angle taken between the
    whole tensors and the formula applied to the tensors themselves, not to their unit vectors.
    """
    return Slerp(t)


@dataclass(frozen=True)
class Slerp(Kernel):
    """y = c_0 * base + c_1 * x, with coefficients that follow from the angle between the two."""

    t: float
    loop_dtypes = LOOP_DTYPES

    def num_passes(self, site: Site) -> int:
        """One, for the angle."""
        return 1

    def num_scratch(self, site: Site) -> int:
        """Three to measure: both sources, and their products."""
        return 3

    def measuring(self, site: Site) -> Hashable:
        """The angle is the same for every t."""
        return Slerp

    def start(self, site: Site) -> KernelRun:
        """Begin; norms and inner product are summed over the blocks."""
        return _SlerpRun(self.t)


class _SlerpRun(KernelRun):
    def __init__(self, t: float, aa: float = 0.0, bb: float = 0.0, ab: float = 0.0) -> None:
        self._t = t
        self._aa, self._bb, self._ab = aa, bb, ab
        self._coefficients = (1.0, 0.0)

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, Slerp)
        run = _SlerpRun(kernel.t, self._aa, self._bb, self._ab)
        run.end_pass(0)
        return run

    def measure(self, index: int, block: Block) -> None:
        a, b, product = block.scratch[:3]
        block.load(0, a)
        block.load(1, b)
        self._ab = add_blocks(self._ab, torch.mul(a, b, out=product))
        self._aa = add_blocks(self._aa, a.mul_(a))
        self._bb = add_blocks(self._bb, b.mul_(b))

    def end_pass(self, index: int) -> None:
        self._coefficients = slerp_coefficients(self._t, self._aa, self._bb, self._ab)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        combine_linearly(block, self._coefficients, out)

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        pieces = stored.split(PIECE_ELEMENTS)
        for aa, bb, ab in chain.from_iterable(run_all([partial(_sum_products, piece) for piece in pieces])):
            self._aa += aa
            self._bb += bb
            self._ab += ab

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        return combine_stored(stored, self._coefficients, out)

    def figures(self) -> Mapping[str, float]:
        """Return the cosine of the angle, and the norms of both tensors."""
        cosine = _find_cosine(self._aa, self._bb, self._ab)
        return {"cosine": cosine, "norm[0]": math.sqrt(self._aa), "norm[1]": math.sqrt(self._bb)}


def _sum_products(stored: Stored) -> list[list[float]]:
    """Return the sums of a * a, b * b and a * b over each block."""
    sums = np.empty((count_blocks(stored.num_elements), 3))
    loops.sum_products(*stored.sources(), stored.num_elements, sums, loops.make_scratch(26))
    found: list[list[float]] = sums.tolist()
    return found


def slerp_coefficients(t: float, aa: float, bb: float, ab: float) -> tuple[float, float]:
    """Return (c_a, c_b) of the interpolation c_a * a + c_b * b.

    Args:
        t: 0 is a, 1 is b; outside of [0, 1] it goes on along the arc.
        aa: the square of a's norm.
        bb: the square of b's norm.
        ab: the inner product of a and b.

    >>> slerp_coefficients(0.5, 1.0, 1.0, 1.0)
    (0.5, 0.5)
    >>> [round(c, 4) for c in slerp_coefficients(0.5, 1.0, 1.0, 0.0)]
    [0.7071, 0.7071]
    """
    cosine = _find_cosine(aa, bb, ab)
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


def _find_cosine(aa: float, bb: float, ab: float) -> float:
    norms = [norm if norm > SMALLEST_NORM else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    return max(-1.0, min(1.0, ab / norms[0] / norms[1]))
