"""Combinations whose coefficients follow from the angles and norms of what is combined: from its Gram matrix."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations_with_replacement
from typing import TYPE_CHECKING, Literal, TypeAlias

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site, count_blocks
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.lazy import np, sum_loops, torch
from raymerge.ops.stored import LOOP_DTYPES, PIECE_ELEMENTS, RunAll, Slot, Stored
from raymerge.ops.sums import add_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Coefficients: TypeAlias = NDArray[np.float64]
    Gram: TypeAlias = NDArray[np.float64]
    """Inner products of vectors, one matrix or one for each of several groups of vectors: of shape (n, n, ...)."""

Origin: TypeAlias = Literal["zero", "first", "optional"]
"""Origin of the vectors. Zero: they are the sources. The first source: they are the differences of the others
from it. Optional: either, and the latter where there is a source more than the first parameter has values, a base."""

RESOLUTION = 2.0**-12
"""A sum of unit vectors that is shorter may be rounding errors alone, for products are rounded to float32."""
SMALLEST_NORM = 1e-8
"""A vector that is no longer than this counts as a unit vector."""


@dataclass(frozen=True)
class GramCombination(Kernel):
    """y = origin + sum(c_i * v_i), with coefficients that follow from the inner products of the vectors v_i."""

    family = "angles and norms"
    rule: Callable[..., Sequence[float] | Coefficients]
    """Called as `rule(gram, *parameters)`, with the matrix of inner products of the vectors, for the coefficients;
    defined at the top level of its module."""
    parameters: tuple[Hashable, ...] = ()
    origin: Origin = "zero"
    loop_dtypes = LOOP_DTYPES

    def num_passes(self, site: Site) -> int:
        """One, for the inner products."""
        return 1

    def num_scratch(self, site: Site) -> int:
        """The vectors and their products; to combine differences, four."""
        has_origin = self.num_origins(site)
        return max(site.num_sources - has_origin + 1, 4 * has_origin)

    def num_origins(self, site: Site) -> int:
        """Return 1 where the first source is what vectors are measured from, and 0 where it is a vector itself."""
        return count_origins(self.origin, self.parameters, site)

    def measuring(self, site: Site) -> Hashable:
        """Inner products are the same for every rule."""
        return GramCombination, self.num_origins(site)

    def weigh(self, gram: Gram, site: Site) -> Sequence[float] | Coefficients:
        """Return the coefficients."""
        return self.rule(gram, *self.parameters)

    def start(self, site: Site) -> KernelRun:
        """Begin; products are summed over the blocks."""
        return _GramRun(self, site)


def count_origins(origin: Origin, parameters: Sequence[Hashable], site: Site) -> int:
    """Return 1 where the first source is what vectors are measured from, and 0 where it is a vector itself."""
    if origin == "optional":
        assert isinstance(parameters[0], tuple)
        return site.num_sources - len(parameters[0])
    return int(origin == "first")


class _GramRun(KernelRun):
    def __init__(self, kernel: GramCombination, site: Site) -> None:
        self._kernel, self._site = kernel, site
        self._num_origins = kernel.num_origins(site)
        self._num_vectors = site.num_sources - self._num_origins
        self._pairs = list(combinations_with_replacement(range(self._num_vectors), 2))
        self._sums = np.zeros(len(self._pairs))
        """The inner product of each pair."""
        self._combination: KernelRun | None = None

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, GramCombination)
        run = _GramRun(kernel, self._site)
        run._sums = self._sums
        run.end_pass(0)
        return run

    def measure(self, index: int, block: Block) -> None:
        spare = block.scratch[self._num_vectors]
        vectors = load_vectors(block, self._num_origins, block.scratch[: self._num_vectors], spare)
        for number, (i, j) in enumerate(self._pairs):
            products = torch.mul(vectors[i], vectors[j], out=spare)
            self._sums[number] = add_blocks(float(self._sums[number]), products)

    def end_pass(self, index: int) -> None:
        gram = np.zeros((self._num_vectors, self._num_vectors))
        for (i, j), total in zip(self._pairs, self._sums, strict=True):
            gram[i, j] = gram[j, i] = total
        with np.errstate(all="ignore"):
            found = self._kernel.weigh(gram, self._site)
        coefficients = tuple(float(coefficient) for coefficient in found)
        kernel = combine_deltas(coefficients) if self._num_origins else LinearCombination(coefficients)
        self._combination = kernel.start(self._site)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        assert self._combination is not None
        self._combination.combine(block, out)

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        pieces = stored.split(PIECE_ELEMENTS)
        calls = [partial(_sum_products, piece, self._num_origins, len(self._pairs)) for piece in pieces]
        for sums in chain.from_iterable(run_all(calls)):
            self._sums += sums

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        assert self._combination is not None
        return self._combination.combine_stored(stored, out)

    def combine_outputs(self, runs: Sequence[KernelRun], stored: Stored, outs: Sequence[Slot]) -> Sequence[float]:
        combinations = [run._combination for run in runs if isinstance(run, _GramRun) and run._combination is not None]
        if len(combinations) < len(runs):
            return super().combine_outputs(runs, stored, outs)
        return combinations[0].combine_outputs(combinations, stored, outs)

    def figures(self) -> Mapping[str, float]:
        """Return the mean cosine of the angles between two vectors, and the norm of each."""
        found = dict(zip(self._pairs, self._sums.tolist(), strict=True))
        cosines = [find_cosine(found[i, i], found[j, j], total) for (i, j), total in found.items() if i < j]
        mean = {"cosine": sum(cosines) / len(cosines)} if cosines else {}
        return mean | {f"norm[{k}]": math.sqrt(found[k, k]) for k in range(self._num_vectors)}


def load_vectors(
    block: Block, num_origins: int, out: Sequence[torch.Tensor], origin: torch.Tensor
) -> Sequence[torch.Tensor]:
    """Write every vector to a block of `out`, and the source that they are measured from, if any, to `origin`."""
    if num_origins:
        block.load(0, origin)
    for source, vector in enumerate(out, start=num_origins):
        block.load(source, vector)
        if num_origins:
            vector.sub_(origin)
    return out


def combine_deltas(coefficients: tuple[float, ...]) -> SparseDeltas:
    """Return the kernel of x_0 + sum(c_i * (x_i - x_0))."""
    return SparseDeltas(coefficients, (1.0,), "none", "none", normalize=False, rescale="none", scale=1.0)


def find_length(gram: Gram, coefficients: Coefficients) -> float:
    """Return the norm of a linear combination of vectors."""
    square = (gram * coefficients * coefficients[:, None]).sum()
    return math.sqrt(max(square, 0.0))  # NaN stays NaN


def find_cosine(aa: float, bb: float, ab: float) -> float:
    """Return the cosine of the angle between two vectors, from their squared norms and their inner product."""
    norms = [norm if norm > SMALLEST_NORM else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
    return max(-1.0, min(1.0, ab / norms[0] / norms[1]))


def _sum_products(stored: Stored, num_origins: int, num_pairs: int) -> NDArray[np.float64]:
    """Return the inner product of each pair of vectors, for each block."""
    sums = np.empty((count_blocks(stored.num_elements), num_pairs))
    scratch = sum_loops.make_product_scratch(len(stored.dtypes) - num_origins)
    sum_loops.sum_products(*stored.sources(), num_origins, stored.num_elements, sums, scratch)
    return sums
