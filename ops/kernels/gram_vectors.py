"""Combinations with coefficients of their own for each row of a tensor, or for each of its columns."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.gram import Origin, count_origins, load_vectors
from raymerge.ops.kernels.sparsifiers.ranks import count_row, count_row_block
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from raymerge.ops.kernels.gram import Coefficients, Gram

_NUM_TEMPORARIES = 16
"""Numbers that a rule needs for each vector and source, at most, besides the inner products."""
_FEW_COLUMNS = 32
"""Rows of so few numbers are added up many at once, by numpy."""
_ELEMENTS_AT_ONCE = 2**12


@dataclass(frozen=True)
class RowCombination(Kernel):
    """Applies `GramCombination` to each vector along the last dimension by itself."""

    family = "angles and norms"
    rule: Callable[..., Coefficients]
    """As for a whole tensor; `gram` has the shape (n, n, rows), what it returns (n, rows)."""
    parameters: tuple[Hashable, ...] = ()
    origin: Origin = "zero"

    def grid(self, site: Site) -> int:
        """Whole rows."""
        return count_row_block(site)

    def num_scratch(self, site: Site) -> int:
        """The vectors, and what they are measured from."""
        return site.num_sources

    def state_nbytes(self, site: Site) -> int:
        """Inner products and coefficients of the rows of a block."""
        num_rows = -(-min(self.grid(site), site.num_elements) // count_row(site))
        return 8 * num_rows * site.num_sources * (site.num_sources + _NUM_TEMPORARIES)

    def measuring(self, site: Site) -> Hashable:
        """Nothing is measured before a block is combined."""
        return RowCombination

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _RowRun(self, site)


@dataclass(frozen=True)
class _RowRun(KernelRun):
    kernel: RowCombination
    site: Site

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, RowCombination)
        return _RowRun(kernel, self.site)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        num_origins = count_origins(self.kernel.origin, self.kernel.parameters, self.site)
        num_vectors = self.site.num_sources - num_origins
        origin = block.scratch[-1]
        load_vectors(block, num_origins, block.scratch[:num_vectors], origin)
        length = count_row(self.site)
        rows = [vector.view(-1, length) for vector in block.scratch[:num_vectors]]
        products = out.view(-1, length)
        gram = np.empty((num_vectors, num_vectors, len(products)))
        for i, j in combinations_with_replacement(range(num_vectors), 2):
            torch.mul(rows[i], rows[j], out=products)
            gram[i, j] = gram[j, i] = _sum_rows(products).cpu().numpy()
        found = _weigh(self.kernel.rule, gram, self.kernel.parameters, out.device)
        for row, coefficients in zip(rows, found, strict=True):
            row.mul_(coefficients[:, None])
        _add_up(block.scratch[:num_vectors], origin if num_origins else None, out)


@dataclass(frozen=True)
class ColumnCombination(Kernel):
    """Applies `GramCombination` to each vector along the first dimension by itself."""

    rule: Callable[..., Coefficients]
    """As in `RowCombination`."""
    parameters: tuple[Hashable, ...] = ()
    origin: Origin = "zero"

    def num_passes(self, site: Site) -> int:
        """One, for the inner products."""
        return 1

    def num_scratch(self, site: Site) -> int:
        """The vectors, their products, and what they are measured from."""
        return site.num_sources + 1

    def state_nbytes(self, site: Site) -> int:
        """Inner products of all columns, and coefficients of the columns of a block."""
        num_sources = site.num_sources
        num_columns = min(_count_columns(site), 3 * BLOCK_ELEMENTS)
        temporary = num_columns * num_sources * (num_sources + _NUM_TEMPORARIES)
        return 8 * (_count_columns(site) * num_sources * (num_sources + 1) // 2 + temporary)

    def measuring(self, site: Site) -> Hashable:
        """Inner products are the same for every rule."""
        return ColumnCombination, count_origins(self.origin, self.parameters, site)

    def start(self, site: Site) -> KernelRun:
        """Begin; products are summed row by row."""
        return _ColumnRun(self, site)


class _ColumnRun(KernelRun):
    def __init__(self, kernel: ColumnCombination, site: Site) -> None:
        self._kernel = kernel
        self._num_columns = _count_columns(site)
        self._num_origins = count_origins(kernel.origin, kernel.parameters, site)
        self._num_vectors = site.num_sources - self._num_origins
        self._pairs = list(combinations_with_replacement(range(self._num_vectors), 2))
        self._sums: torch.Tensor | None = None
        """The inner products of each pair, where the blocks are."""

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, ColumnCombination)
        run: _ColumnRun = super().share(kernel)  # type: ignore[assignment]
        run._kernel = kernel
        return run

    def measure(self, index: int, block: Block) -> None:
        spare = block.scratch[self._num_vectors]
        vectors = load_vectors(block, self._num_origins, block.scratch[: self._num_vectors], spare)
        if self._sums is None:
            shape = len(self._pairs), self._num_columns
            self._sums = torch.zeros(shape, dtype=torch.float64, device=spare.device)
        for number, (i, j) in enumerate(self._pairs):
            products = torch.mul(vectors[i], vectors[j], out=spare)
            for columns, elements in self._cut(block):
                size = columns.stop - columns.start
                _add_rows(self._sums[number, columns], products[elements].view(-1, size))

    def end_pass(self, index: int) -> None:
        pass

    def combine(self, block: Block, out: torch.Tensor) -> None:
        origin = block.scratch[self._num_vectors]
        vectors = load_vectors(block, self._num_origins, block.scratch[: self._num_vectors], origin)
        found: dict[tuple[int, int], torch.Tensor] = {}
        for columns, elements in self._cut(block):
            key = columns.start, columns.stop
            if key not in found:
                found[key] = self._weigh_columns(columns, out.device)
            for vector, coefficients in zip(vectors, found[key], strict=True):
                vector[elements].view(-1, columns.stop - columns.start).mul_(coefficients)
        _add_up(vectors, origin if self._num_origins else None, out)

    def _cut(self, block: Block) -> Iterator[tuple[slice, slice]]:
        """Yield the columns of part of a row in a block, or of all whole rows, and where they are in the block."""
        start = block.start
        while start < block.stop:
            first = start % self._num_columns
            size = min(self._num_columns - first, block.stop - start)
            num_rows = 1 if first else max(1, (block.stop - start) // self._num_columns)
            elements = slice(start - block.start, start - block.start + num_rows * size)
            yield slice(first, first + size), elements
            start += num_rows * size

    def _weigh_columns(self, columns: slice, device: torch.device) -> torch.Tensor:
        assert self._sums is not None
        sums = self._sums[:, columns].cpu().numpy()
        gram = np.empty((self._num_vectors, self._num_vectors, sums.shape[1]))
        for (i, j), products in zip(self._pairs, sums, strict=True):
            gram[i, j] = gram[j, i] = products
        return _weigh(self._kernel.rule, gram, self._kernel.parameters, device)


def _count_columns(site: Site) -> int:
    """Return the vectors along the first dimension; the first is the last one, too, where there is no other."""
    return max(1, math.prod(site.shape[1:]))


def _weigh(
    rule: Callable[..., Coefficients], gram: Gram, parameters: tuple[Hashable, ...], device: torch.device
) -> torch.Tensor:
    """Return the coefficients, in float32, where they are needed."""
    with np.errstate(all="ignore"):
        found = rule(gram, *parameters)
    return torch.from_numpy(found.astype(np.float32)).to(device)


def _add_rows(sums: torch.Tensor, rows: torch.Tensor) -> None:
    """Add rows to float64 sums, one after the other: in one order, however many there are at once."""
    if rows.shape[1] > _FEW_COLUMNS:
        for row in rows:
            sums.add_(row)
        return
    num_rows = _ELEMENTS_AT_ONCE // rows.shape[1]
    for first in range(0, len(rows), num_rows):
        added = np.vstack([sums.cpu().numpy(), rows[first : first + num_rows].cpu().numpy()])
        sums.copy_(torch.from_numpy(np.add.accumulate(added, axis=0)[-1]))


def _sum_rows(x: torch.Tensor) -> torch.Tensor:
    """Return the sum of each row; overwrites `x`. Halves are added to each other, in one order on every processor."""
    length = x.shape[1]
    while length > 1:
        half = length // 2
        x[:, :half].add_(x[:, length - half : length])
        length -= half
    return x[:, 0].double()


def _add_up(vectors: Sequence[torch.Tensor], origin: torch.Tensor | None, out: torch.Tensor) -> None:
    """Write the sum of vectors, and of what they are measured from, to `out`."""
    out.copy_(vectors[0])
    for vector in vectors[1:]:
        out.add_(vector)
    if origin is not None:
        out.add_(origin)
