"""From updates of a matrix to the factors of one update: what a merge of LoRA adapters writes.

Both factors of a module come as one flat row of values, `right` (rank x columns) before `left` (rows x rank), so that
they are made of one reading of the inputs and of one decomposition.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raymerge.ops.decoders.decoder import Decoder, Raw, find_dtype
from raymerge.ops.decoders.factors import OVERSAMPLING, factorise
from raymerge.ops.decoders.low_rank import Factor, Term
from raymerge.ops.lazy import torch

_STRIP_ROWS = 1024
"""Rows of factors that are worked on at once in float64, or as many as there are ranks."""
_STRIP_ELEMENTS = 2**21
"""Elements of a merged update that are made at once."""
_KEPT_ELEMENTS = 2**26
"""Merged updates with no more elements are kept between looks at them; larger ones are merged again for each."""
_LIBRARY_NBYTES = 32 * 2**20
"""Taken by BLAS and LAPACK for blocks that they pack, and by the allocator between calls."""
_RESOLUTION = 1e-12
"""Singular values that are smaller, as a share of the largest, count as zero."""


@dataclass(frozen=True, slots=True)
class Zeros(Decoder):
    """Zeros, of which nothing is stored."""

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Write zeros."""
        return out.zero_()


@dataclass(frozen=True, slots=True)
class Scaled(Decoder):
    """Stored values times a number: float32(scale * x), in float64 until then."""

    below: Decoder
    scale: float

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the room for values in float64."""
        return self.below.temporary_nbytes(num_elements) + 8 * num_elements

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Scale the values."""
        return out.copy_(self.below.decode(raw, start, stop, out).double().mul_(self.scale))


@dataclass(frozen=True, slots=True)
class UpdateFactors(Decoder):
    """The factors of one update; their values are all made when the first of them are decoded, on the CPU."""

    rows: int
    columns: int
    rank: int

    @property
    def num_values(self) -> int:
        """Values of both factors."""
        return self.rank * (self.rows + self.columns)

    def start(self) -> Decoder:
        """Return a decoder that keeps the factors."""
        return _Made(self)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Make the factors for these elements alone; see `Decoder.start`."""
        return self.start().decode(raw, start, stop, out)

    def fill(self, raw: Raw, right: torch.Tensor, left: torch.Tensor) -> None:
        """Write both factors; NaN where an input has values that are not finite, and they are decomposed.

        Args:
            raw: all bytes.
            right: zeros, rank x columns.
            left: zeros, rows x rank.
        """
        try:
            self.make(raw, right, left)
        except ArithmeticError:
            right.fill_(math.nan)
            left.fill_(math.nan)

    @abstractmethod
    def make(self, raw: Raw, right: torch.Tensor, left: torch.Tensor) -> None:
        """Do as `fill` does.

        Raises:
            ArithmeticError: values are not finite.
        """


class _Made(Decoder):
    def __init__(self, what: UpdateFactors) -> None:
        self._what = what
        self._values: torch.Tensor | None = None

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        if self._values is None:
            what = self._what
            self._values = torch.zeros(what.num_values)
            middle = what.rank * what.columns
            right, left = self._values[:middle].view(what.rank, -1), self._values[middle:].view(what.rows, -1)
            what.fill(raw, right, left)
        return out.copy_(self._values[start:stop])


@dataclass(frozen=True, slots=True)
class JoinedTerms(UpdateFactors):
    """The sum of some terms: their factors one after the other, or the nearest product of a smaller rank.

    The pieces are the left and the right factor of each term. For a smaller rank, L = Q_l R_l and R^T = Q_r R_r are
    decomposed strip by strip of their rows, of which the triangles alone are kept, and R_l R_r^T = U S V^T; with the
    `rank` largest of S, the factors are L R_r^T V S^(-1/2) and S^(-1/2) U^T R_l R. No matrix of rows x columns is made.

    Source: Eckart and Young 1936, "The Approximation of One Matrix by Another of Lower Rank".
    """

    terms: tuple[Term, ...]

    @property
    def _num_ranks(self) -> int:
        return sum(term.rank for term in self.terms)

    def state_nbytes(self, num_elements: int) -> int:
        """Return the room for the result, and for triangles and strips in float64."""
        most = max(term.rank for term in self.terms)
        own = 4 * self.num_values + 12 * most * max(self.columns, _STRIP_ROWS)
        if self.rank == self._num_ranks:
            return own
        ranks, strip = self._num_ranks, self._num_strip_rows
        return own + 8 * (12 * ranks**2 + 4 * ranks * strip + strip * self.rank) + _LIBRARY_NBYTES

    @property
    def _num_strip_rows(self) -> int:
        return max(_STRIP_ROWS, self._num_ranks)

    def make(self, raw: Raw, right: torch.Tensor, left: torch.Tensor) -> None:
        """Join the factors, or decompose them."""
        if self.rank == self._num_ranks:
            first = 0
            for (x, y), term in zip(self._pair(raw.pieces), self.terms, strict=True):
                last = first + term.rank
                right[first:last] = y.to(torch.float64, copy=True).mul_(term.scale)
                left[:, first:last] = x
                first = last
            return
        of_left = self._find_triangle(raw, of_left=True)
        of_right = self._find_triangle(raw, of_left=False)
        u, values, v = torch.linalg.svd(of_left @ of_right.T, full_matrices=False)
        kept = min(self.rank, int((values > _RESOLUTION * values[0]).sum()))
        roots = values[:kept].sqrt()
        to_left, to_right = of_right.T @ v[:kept].T / roots, of_left.T @ u[:, :kept] / roots
        for of, factor, out in ((True, to_left, left), (False, to_right, right.T)):
            start = 0
            for strip in self._cut(raw, of_left=of):
                out[start : start + len(strip), :kept] = strip @ factor
                start += len(strip)

    def _find_triangle(self, raw: Raw, *, of_left: bool) -> torch.Tensor:
        """Return the triangle of the decomposition of all left factors side by side, or of all right ones, turned."""
        triangle = torch.zeros(0, self._num_ranks, dtype=torch.float64)
        for strip in self._cut(raw, of_left=of_left):
            if not bool(strip.isfinite().all()):
                raise ArithmeticError("not finite")
            triangle = torch.linalg.qr(torch.cat([triangle, strip]), mode="r")[1]
        return triangle

    def _cut(self, raw: Raw, *, of_left: bool) -> Iterator[torch.Tensor]:
        """Yield rows of all left factors side by side, or of all right ones, turned, in float64."""
        pairs = [*self._pair(raw.pieces)]
        for start in range(0, self.rows if of_left else self.columns, self._num_strip_rows):
            stop = start + self._num_strip_rows
            if of_left:
                yield torch.cat([x[start:stop].double() for x, _ in pairs], 1)
            else:
                parts = zip(pairs, self.terms, strict=True)
                yield torch.cat([y[:, start:stop].double() * term.scale for (_, y), term in parts]).T

    def _pair(self, pieces: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield both factors of each term as they are stored."""
        for k, term in enumerate(self.terms):
            yield (
                _read(pieces[2 * k], term.left, (self.rows, term.rank)),
                _read(pieces[2 * k + 1], term.right, (term.rank, self.columns)),
            )


@dataclass(frozen=True, slots=True)
class MergedUpdates(UpdateFactors):
    """The nearest product of a rank to what a method makes of whole updates, which are merged block by block."""

    full: Decoder
    """Merges them: rows x columns."""

    def state_nbytes(self, num_elements: int) -> int:
        """Return the room for the result, for what merges, and for directions and products."""
        whole, step = self.rows * self.columns, self._step
        width = min(self.rows, self.columns, self.rank + OVERSAMPLING)
        kept = 4 * whole if whole <= _KEPT_ELEMENTS else 0
        directions = 8 * width * (6 * self.columns + 4 * self.rows) + 64 * width**2
        merging = self.full.state_nbytes(step) + self.full.temporary_nbytes(step)
        return 4 * self.num_values + kept + directions + merging + 24 * step + _LIBRARY_NBYTES

    @property
    def _step(self) -> int:
        return min(self.rows, max(1, _STRIP_ELEMENTS // self.columns)) * self.columns

    def make(self, raw: Raw, right: torch.Tensor, left: torch.Tensor) -> None:
        """Merge, and decompose."""
        kept = [*self._merge(raw)] if self.rows * self.columns <= _KEPT_ELEMENTS else None
        factors = factorise(lambda: iter(kept or self._merge(raw)), self.rows, self.columns, self.rank)
        if factors is not None:
            right[: factors.rank] = factors.right
            left[:, : factors.rank] = factors.left

    def _merge(self, raw: Raw) -> Iterator[torch.Tensor]:
        """Yield the merged update, some rows at a time."""
        whole = self.rows * self.columns
        raw = Raw(raw.pieces, 0, whole)
        run = self.full.start()
        for index in range(run.num_passes):
            for start in range(0, whole, self._step):
                run.measure(index, raw, start, min(start + self._step, whole))
            run.end_pass(index)
        for start in range(0, whole, self._step):
            stop = min(start + self._step, whole)
            block = run.decode(raw, start, stop, torch.empty(stop - start))
            if not bool(block.isfinite().all()):
                raise ArithmeticError("not finite")
            yield block.view(-1, self.columns)


def _read(piece: torch.Tensor, factor: Factor, shape: tuple[int, int]) -> torch.Tensor:
    return piece.view(find_dtype(factor.dtype)).view(shape)
