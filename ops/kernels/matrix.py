"""Deltas that are merged as whole matrices, by way of the inner products of their columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import torch

RESOLUTION = 1e-6
"""Singular values that are smaller, as a share of the largest, count as zero: float32 does not tell their vectors."""
STRIP_ELEMENTS = 2**20
"""Elements of a matrix that are worked on at once in float64."""
STRIP_LENGTH = 2**13
"""Rows of a strip at most: a multiplication packs longer ones in more memory than they take."""
LAPACK_SQUARES, BLAS_NBYTES = 6, 32 * 2**20
"""Matrices that an eigendecomposition takes besides its result, with what the allocator keeps between them, and memory
for blocks that a multiplication packs and for threads. Measured as anonymous memory with matrices of 128 to 1600 rows,
and of 60,000 rows of 64."""


class Grams:
    """The inner products of the deltas' columns or, if there are fewer rows than columns, of their rows.

    In what follows deltas are as if they had at least as many rows as columns: X_i, transposed if `is_wide`.
    """

    def __init__(self, num_models: int, size: int, products: str, *, is_wide: bool, device: torch.device) -> None:
        self.num_models, self.size, self.is_wide = num_models, size, is_wide
        self._found = {
            (i, j): torch.zeros(size, size, dtype=torch.float64, device=device)
            for i in range(num_models)
            for j in range(i, num_models)
            if i == j or products == "pairs"
        }

    def add(self, strips: list[torch.Tensor]) -> None:
        """Add the products of further rows of all X_i."""
        for (i, j), gram in self._found.items():
            gram.addmm_(strips[i].T, strips[j])

    def __call__(self, i: int, j: int) -> torch.Tensor:
        """Return X_i^T X_j."""
        return self._found[i, j] if i <= j else self._found[j, i].T

    def are_finite(self) -> bool:
        """Return whether no delta has NaN or infinity."""
        return all(bool(self(i, i).isfinite().all()) for i in range(self.num_models))


Weigh = Callable[..., "list[torch.Tensor]"]
"""Returns C_i for the merged delta sum(X_i C_i), from `Grams` and parameters."""


@dataclass(frozen=True)
class MatrixDeltas(Kernel):
    """y = base + scale * sum(X_i C_i), with square matrices C_i from all inner products of the deltas' columns.

    What is no matrix, or has a single row or column, gets the mean of the deltas. Tensors of three dimensions are
    stacks of matrices, each of which is merged by itself. So factors are no larger than the square of the shorter
    side, and a matrix with more rows than columns, such as an embedding, is read block by block.
    """

    weigh: Weigh
    parameters: tuple[Any, ...]
    products: Literal["sum", "each", "pairs"]
    """The inner products that are taken: those of the sum of all deltas, of each delta, or of all pairs of deltas."""
    num_squares: tuple[int, int, int]
    """Most square matrices that `weigh` makes at once: in any case, for each model, and for each pair of models."""
    scale: float = 1.0
    num_wide_squares: tuple[int, int, int] | None = None
    """The same for matrices with fewer rows than columns, where it differs."""

    family = "matrices"
    tolerance = 1e-5

    def grid(self, site: Site) -> int:
        """Some rows where there are more of them than columns; else a whole matrix."""
        if not is_matrix(site):
            return BLOCK_ELEMENTS
        rows, columns = site.shape[-2:]
        return max(1, STRIP_ELEMENTS // columns) * columns if self.num_passes(site) else rows * columns

    def num_passes(self, site: Site) -> int:
        """Return one where rows are read block by block."""
        return int(is_matrix(site) and len(site.shape) == 2 and site.shape[0] > site.shape[1])

    def num_scratch(self, site: Site) -> int:
        """The base and all deltas, or their sum and a spare."""
        return 1 + (site.num_sources - 1 if self.products != "sum" and is_matrix(site) else 2)

    def state_nbytes(self, site: Site) -> int:
        """Inner products, what is made of them, and strips of all deltas in float64."""
        if not is_matrix(site):
            return 0
        num_models = site.num_sources - 1
        num_deltas = 1 if self.products == "sum" else num_models
        num_grams = num_models * (num_models + 1) // 2 if self.products == "pairs" else num_deltas
        rows, columns = site.shape[-2:]
        size, length = sorted((rows, columns))
        once, per_model, per_pair = (rows < columns and self.num_wide_squares) or self.num_squares
        num_made = once + per_model * num_models + per_pair * num_models**2
        num_squares = num_grams + num_made + LAPACK_SQUARES
        strip = min(length, count_strip_rows(size)) * size
        return BLAS_NBYTES + 8 * (num_squares * size**2 + (num_deltas + 3) * strip)

    def measuring(self, site: Site) -> Hashable:
        """Return all but the scale."""
        return self.weigh, self.parameters, self.products

    def start(self, site: Site) -> KernelRun:
        """Begin without inner products."""
        return _MatrixRun(self, site)


def is_matrix(site: Site) -> bool:
    """Return whether a tensor is a matrix, or a stack of them, with more than one row and column."""
    return len(site.shape) in (2, 3) and min(site.shape[-2:]) > 1


def count_strip_rows(size: int) -> int:
    """Return how many rows of a matrix with so many columns are worked on at once."""
    return min(STRIP_LENGTH, max(1, STRIP_ELEMENTS // size))


class _MatrixRun(KernelRun):
    def __init__(self, kernel: MatrixDeltas, site: Site) -> None:
        self.kernel, self.site = kernel, site
        self.num_models = site.num_sources - 1
        self.grams: Grams | None = None
        self.factors: list[torch.Tensor] = []

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, MatrixDeltas)
        run = _MatrixRun(kernel, self.site)
        run.factors = self.factors
        return run

    def measure(self, index: int, block: Block) -> None:
        self._add_products(self._load(block)[1])

    def end_pass(self, index: int) -> None:
        assert self.grams is not None
        self.factors = self._weigh(self.grams)
        self.grams = None

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base, deltas = self._load(block)
        if not is_matrix(self.site):
            torch.mul(deltas[0], self.kernel.scale / self.num_models, out=out).add_(base)
            return
        if self.kernel.num_passes(self.site):
            self._add_factored(base, deltas, out)
            return
        step = self.kernel.grid(self.site)
        for start in range(0, out.numel(), step):
            pieces = [x[start : start + step] for x in (base, out, *deltas)]
            self._add_products(pieces[2:])
            self.end_pass(0)
            self._add_factored(pieces[0], pieces[2:], pieces[1])
            self.factors = []

    def _load(self, block: Block) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """Return the base and the deltas, or their sum alone where no more is needed."""
        base, *rest = block.scratch
        block.load(0, base)
        if self.kernel.products != "sum" and is_matrix(self.site):
            deltas = rest[: self.num_models]  # where several are merged at once, there is more
            return base, [block.load(k + 1, delta).sub_(base) for k, delta in enumerate(deltas)]
        total, spare = rest[:2]
        total.zero_()
        for k in range(self.num_models):
            total.add_(block.load(k + 1, spare).sub_(base))
        return base, [total]

    def _add_products(self, deltas: list[torch.Tensor]) -> None:
        if self.grams is None:
            rows, columns = self.site.shape[-2:]
            self.grams = Grams(
                len(deltas),
                min(rows, columns),
                self.kernel.products,
                is_wide=rows < columns,
                device=deltas[0].device,
            )
        for strips in self._cut(deltas):
            self.grams.add([strip.double() for strip in strips])

    def _weigh(self, grams: Grams) -> list[torch.Tensor]:
        if grams.are_finite():
            return self.kernel.weigh(grams, *self.kernel.parameters)
        return [torch.full_like(grams(i, i), math.nan) for i in range(grams.num_models)]

    def _add_factored(self, base: torch.Tensor, deltas: list[torch.Tensor], out: torch.Tensor) -> None:
        for origin, target, *strips in self._cut([base, out, *deltas]):
            total = strips[0].double() @ self.factors[0]
            for strip, factor in zip(strips[1:], self.factors[1:], strict=True):
                total.addmm_(strip.double(), factor)
            target.copy_(total.mul_(self.kernel.scale).add_(origin))

    def _cut(self, tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        """Yield the same rows of all matrices, transposed where there are fewer rows than columns."""
        rows, columns = self.site.shape[-2:]
        matrices = [x.view(-1, columns).T if rows < columns else x.view(-1, columns) for x in tensors]
        step = count_strip_rows(min(rows, columns))
        for start in range(0, len(matrices[0]), step):
            yield [matrix[start : start + step] for matrix in matrices]


def decompose(gram: torch.Tensor, floor: torch.Tensor | float = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the singular values of X, the largest first, and its right singular vectors as columns, from X^T X.

    Values that are too small to tell their vectors, or a share of `floor` that is, are zero, as are their vectors.
    """
    squares, vectors = torch.linalg.eigh(gram)
    values = squares.flip(0).clamp_(min=0).sqrt_()
    is_known = values > RESOLUTION * values[0].clamp(min=floor)
    return values * is_known, vectors.flip(1).mul_(is_known)


def invert(values: torch.Tensor) -> torch.Tensor:
    """Return the inverse of each value, or zero for zero."""
    return torch.where(values > 0, 1 / values, 0)


def find_root(gram: torch.Tensor) -> torch.Tensor:
    """Return the inverse square root R of X^T X, so that X R is the polar factor of X.

    Where X has no direction, the polar factor has none either: it is a partial isometry, and there is only one.
    """
    values, vectors = decompose(gram)
    return vectors * invert(values) @ vectors.T


def find_mean(values: torch.Tensor) -> torch.Tensor:
    """Return the mean of the singular values that are not zero."""
    return values.sum() / (values > 0).sum().clamp(min=1)
