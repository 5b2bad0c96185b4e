"""Deltas that are merged element by element in the singular directions that they have in common."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.matrix import (
    BLAS_NBYTES,
    LAPACK_SQUARES,
    STRIP_ELEMENTS,
    count_strip_rows,
    decompose,
    invert,
    is_matrix,
)
from raymerge.ops.lazy import torch


@dataclass(frozen=True)
class AlignedDeltas(Kernel):
    """y = base + U * merge(U^T D_1 ... U^T D_n) with the left singular vectors U of [D_1 ... D_n].

    Where there are more rows than columns in all deltas together, rows are read block by block: U^T D_i follows from
    the inner products of all columns. Any other matrix is in memory as a whole.
    """

    inner: Kernel
    """Merges U^T D_i, element by element, as if they were deltas from zeros; and what is no matrix."""

    family = "matrices"
    tolerance = 1e-5

    @property
    def is_random(self) -> bool:
        """Whether the inner kernel draws."""
        return self.inner.is_random

    def grid(self, site: Site) -> int:
        """Some rows of a long matrix, or a whole one; the inner kernel's blocks of what is none."""
        if not is_matrix(site):
            return self.inner.grid(site)
        rows, columns = site.shape[-2:]
        return max(1, STRIP_ELEMENTS // columns) * columns if self.num_passes(site) else rows * columns

    def num_passes(self, site: Site) -> int:
        """Return one where rows are read block by block."""
        return int(len(site.shape) == 2 and _is_long(site)) if is_matrix(site) else self.inner.num_passes(site)

    def num_scratch(self, site: Site) -> int:
        """The base, or what is merged, and all deltas."""
        return site.num_sources if is_matrix(site) else self.inner.num_scratch(site)

    def state_nbytes(self, site: Site) -> int:
        """Inner products, what is made of them, strips of all deltas in float64, and what the inner kernel takes."""
        if not is_matrix(site):
            return self.inner.state_nbytes(site)
        rows, columns = site.shape[-2:]
        num_models = site.num_sources - 1
        size = num_models * columns if _is_long(site) else rows
        aligned = Site(site.name, (size, columns), site.num_sources, site.seed)
        inner = self.inner.state_nbytes(aligned) + 4 * BLOCK_ELEMENTS * (1 + self.inner.num_scratch(aligned))
        strip = size * min(rows if _is_long(site) else columns, count_strip_rows(size))
        return BLAS_NBYTES + inner + 8 * ((LAPACK_SQUARES + 5) * size**2 + 4 * strip)

    def measuring(self, site: Site) -> Hashable:
        """Return all there is: what is merged is known after the last pass."""
        return self if is_matrix(site) else (AlignedDeltas, self.inner.measuring(site))

    def start(self, site: Site) -> KernelRun:
        """Begin with one tensor."""
        return _AlignedRun(self.inner, site) if is_matrix(site) else _InnerRun(self.inner.start(site))


def _is_long(site: Site) -> bool:
    """Return whether a matrix has more rows than all deltas together have columns."""
    rows, columns = site.shape[-2:]
    return rows > (site.num_sources - 1) * columns


class _InnerRun(KernelRun):
    """Merges what is no matrix."""

    def __init__(self, run: KernelRun) -> None:
        self._run = run

    def measure(self, index: int, block: Block) -> None:
        self._run.measure(index, block)

    def end_pass(self, index: int) -> None:
        self._run.end_pass(index)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        self._run.combine(block, out)

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, AlignedDeltas)
        return _InnerRun(self._run.share(kernel.inner))


class _AlignedRun(KernelRun):
    def __init__(self, inner: Kernel, site: Site) -> None:
        self._inner, self._site = inner, site
        self._rows, self._columns = site.shape[-2:]
        self._num_models = site.num_sources - 1
        self._gram: torch.Tensor | None = None
        self._factors: list[torch.Tensor] = []
        """C_i of a long matrix, whose merged delta is sum(D_i C_i)."""

    def measure(self, index: int, block: Block) -> None:
        self._add_columns(self._load(block))

    def end_pass(self, index: int) -> None:
        self._factors = self._find_factors()

    def combine(self, block: Block, out: torch.Tensor) -> None:
        if self._factors:
            deltas = self._load(block)
            self._add_factored(block.load(0, block.scratch[0]), deltas, out)
            return
        step = self._rows * self._columns
        deltas = self._load(block)
        for start in range(0, out.numel(), step):
            pieces = [delta[start : start + step] for delta in deltas]
            merged, target = block.scratch[0][start : start + step], out[start : start + step]
            if _is_long(self._site):
                self._add_columns(pieces)
                factors, self._factors = self._find_factors(), []
                self._add_factored(merged.zero_(), pieces, target, factors)
            else:
                self._merge_aligned(pieces, merged, target)
        out.add_(block.load(0, block.scratch[0]))

    def _load(self, block: Block) -> list[torch.Tensor]:
        """Return the deltas; leaves the base in the first block of scratch."""
        base, *deltas = block.scratch
        block.load(0, base)
        return [block.load(k + 1, delta).sub_(base) for k, delta in enumerate(deltas[: self._num_models])]

    def _add_columns(self, deltas: list[torch.Tensor]) -> None:
        """Add the inner products of all deltas' columns, of some rows."""
        size = self._num_models * self._columns
        if self._gram is None:
            self._gram = torch.zeros(size, size, dtype=torch.float64, device=deltas[0].device)
        for rows in self._cut_rows(deltas):
            strip = torch.cat(rows, 1).double()
            self._gram.addmm_(strip.T, strip)

    def _cut_rows(self, tensors: list[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
        matrices = [tensor.view(-1, self._columns) for tensor in tensors]
        step = count_strip_rows(self._num_models * self._columns)
        for start in range(0, len(matrices[0]), step):
            yield [matrix[start : start + step] for matrix in matrices]

    def _find_factors(self) -> list[torch.Tensor]:
        """Return V_i S^-1 M of a long matrix, with M of S V_1^T ... S V_n^T, from the inner products of columns."""
        assert self._gram is not None
        gram, self._gram = self._gram, None
        columns, shape = self._columns, (self._columns, self._columns)
        if not gram.isfinite().all():
            return [gram.new_full(shape, math.nan) for _ in range(self._num_models)]
        values, vectors = decompose(gram)
        del gram
        kept = int(values.count_nonzero())
        parts = [vectors[k * columns : (k + 1) * columns, :kept] for k in range(self._num_models)]
        aligned = [(part * values[:kept]).T.float().contiguous().view(-1) for part in parts]
        merged = torch.empty(kept * columns, device=vectors.device)
        self._merge(aligned, merged)
        del aligned
        scaled = merged.view(kept, columns).double().mul_(invert(values[:kept])[:, None])
        return [part @ scaled for part in parts]

    def _add_factored(
        self, base: torch.Tensor, deltas: list[torch.Tensor], out: torch.Tensor, factors: Sequence[torch.Tensor] = ()
    ) -> None:
        for origin, target, *strips in self._cut_rows([base, out, *deltas]):
            total = origin.double()
            for strip, factor in zip(strips, factors or self._factors, strict=True):
                total.addmm_(strip.double(), factor)
            target.copy_(total)

    def _merge_aligned(self, deltas: list[torch.Tensor], merged: torch.Tensor, out: torch.Tensor) -> None:
        """Write what is merged of a whole matrix to `out`; overwrites the deltas, and `merged`."""
        rows, columns = self._rows, self._columns
        matrices = [delta.view(rows, columns) for delta in deltas]
        step = count_strip_rows(rows)
        bounds = [(start, min(start + step, columns)) for start in range(0, columns, step)]
        gram = torch.zeros(rows, rows, dtype=torch.float64, device=out.device)
        for matrix in matrices:
            for start, stop in bounds:
                strip = matrix[:, start:stop].double()
                gram.addmm_(strip, strip.T)
        if not gram.isfinite().all():
            out.fill_(math.nan)
            return
        values, vectors = decompose(gram)
        del gram
        kept = int(values.count_nonzero())
        left = vectors[:, :kept]
        for matrix in matrices:
            for start, stop in bounds:
                matrix[:kept, start:stop] = left.T @ matrix[:, start:stop].double()
        merged = merged[: kept * columns]
        self._merge([delta[: kept * columns] for delta in deltas], merged)
        for start, stop in bounds:
            out.view(rows, columns)[:, start:stop] = left @ merged.view(kept, columns)[:, start:stop].double()

    def _merge(self, aligned: list[torch.Tensor], out: torch.Tensor) -> None:
        """Have the inner kernel merge deltas from zeros."""
        shape = (out.numel() // self._columns, self._columns)
        site = Site(self._site.name, shape, self._num_models + 1, self._site.seed)
        run = self._inner.start(site)
        size = min(BLOCK_ELEMENTS, out.numel())
        scratch = [torch.empty(size, device=out.device) for _ in range(self._inner.num_scratch(site))]
        blocks = [_Deltas(start, out.numel(), aligned, scratch) for start in range(0, out.numel(), BLOCK_ELEMENTS)]
        for index in range(self._inner.num_passes(site)):
            for block in blocks:
                run.measure(index, block)
            run.end_pass(index)
        for block in blocks:
            run.combine(block, out[block.start : block.stop])


class _Deltas(Block):
    """A block of deltas from zeros."""

    def __init__(
        self, start: int, num_elements: int, deltas: Sequence[torch.Tensor], scratch: Sequence[torch.Tensor]
    ) -> None:
        self.start, self.stop = start, min(start + BLOCK_ELEMENTS, num_elements)
        self.scratch = [spare[: self.stop - start] for spare in scratch]
        self._deltas = deltas

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(self._deltas[source - 1][self.start : self.stop]) if source else out.zero_()
