"""Low-rank updates: a matrix plus products of two thin ones, as LoRA adapters store them.

The products are exact. Each row of the left factor, and each column of the right one, is first rounded to 23 bits of
its largest value, which loses no more than float32 arithmetic does; then sums of up to 64 products fit in float64
without rounding. So the bits do not depend on the order of additions: not on blocks, threads, processors or libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.lazy import low_rank_loops, np, torch
from raymerge.ops.stored import LOOP_DTYPES, widen

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 64
"""Ranks whose products are added up exactly: 2 * 23 bits, and 6 for 64 of them, are no more than float64 has."""

COLUMNS = 512
"""Columns of a product that loops make at once: four rows of them stay in a core's first cache."""

_GROUP = 4
"""Ranks of a chunk are filled up with zeros to a multiple of this."""

_MAGIC = 1.5 * 2.0**30
"""Times the power of two of the largest value: what is added to a value, and taken off again, to round it."""
_EXPONENT = 0x7FF0000000000000

_LEFT_ELEMENTS = 2**19
"""Of the left factors that are at hand at once, in float64."""
_TILE_ELEMENTS = 2**21
"""Of a product that torch makes at once."""


@dataclass(frozen=True, slots=True)
class Factor:
    """How one factor of an update is stored."""

    dtype: str
    """Torch's word for it."""
    strides: tuple[int, int, int]
    """Distance, in elements, of neighbouring matrices, rows and columns of the factor."""
    is_whole: bool = True
    """Whether all of it is read, in one range; of a left factor else the rows at hand alone: in one range where a row's
    elements are neighbours, in one for each rank where those of a column are."""


@dataclass(frozen=True, slots=True)
class Term:
    """One update: scale * left @ right, for each matrix of a stack."""

    rank: int
    scale: float
    left: Factor
    """Rows x rank."""
    right: Factor
    """Rank x columns."""

    @property
    def num_left(self) -> int:
        """Byte ranges of the left factor."""
        return self.rank if not self.left.is_whole and self.left.strides[1] == 1 != self.rank else 1

    def chunks(self) -> Iterator[tuple[int, int]]:
        """Yield the ranks [start, stop) that are added up exactly."""
        for start in range(0, self.rank, CHUNK):
            yield start, min(start + CHUNK, self.rank)


@dataclass(frozen=True, slots=True)
class LowRankUpdate(Decoder):
    """Values of a matrix, or a stack of them, plus terms: float32(x + sum(terms)), in float64 until then."""

    below: Decoder
    rows: int
    """Of each matrix."""
    columns: int
    terms: tuple[Term, ...]

    @property
    def has_loops(self) -> bool:
        """Return whether there are loops for what is below."""
        return self.below.has_loops

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the room for parts of both factors and of the product."""
        rows = num_elements // self.columns + 2
        ranks = sum(-(-term.rank // _GROUP) * _GROUP + CHUNK for term in self.terms)
        largest = max(term.rank for term in self.terms)
        left = 3 * min(rows, self._step(ranks)) * ranks * 8 + rows * largest * 4
        right = 5 * largest * self.columns * 8 + ranks * COLUMNS * 8
        tile = 4 * min(rows * self.columns, max(_TILE_ELEMENTS, self.columns)) * 8
        return self.below.temporary_nbytes(num_elements) + left + right + tile

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Add the terms, a tile of whole rows at a time."""
        below, factors = self._split(raw.pieces)
        self.below.decode(Raw(below, raw.start, raw.stop), start, stop, out)
        first, last = self._span(raw.start, raw.stop)
        lefts = [_join([_read_torch(piece, term.left) for piece in left]) for left, _, term in factors]
        rights = [_read_torch(right, term.right) for _, right, term in factors]
        for matrix, row, end in self._tiles(start, stop, max(1, _TILE_ELEMENTS // self.columns)):
            total = torch.zeros(end - row, self.columns, dtype=torch.float64, device=out.device)
            for left, right, (_, _, term) in zip(lefts, rights, factors, strict=True):
                x = _view_left(left, term, matrix, row, end, matrix * self.rows + row - first, last - first).double()
                y = _view(right, term.right, matrix, (0, term.rank), self.columns).double()
                for k, after in term.chunks():
                    scaled = _round_torch(x[:, k:after] * term.scale, 1)
                    total += scaled @ _round_torch(y[k:after], 0)
            offset = (matrix * self.rows + row) * self.columns
            begin, finish = max(start, offset), min(stop, offset + total.numel())
            values = out[begin - start : finish - start]
            values.copy_(total.view(-1)[begin - offset : finish - offset].add_(values))
        return out

    def decode_stored(
        self, pieces: Sequence[memoryview], span: tuple[int, int], start: int, stop: int, out: NDArray[np.float32]
    ) -> None:
        """Do the same by loops."""
        below, factors = self._split(pieces)
        if isinstance(self.below, Plain):
            stored = self.below.find_stored(below[0], start - span[0], stop - span[0])
        else:
            self.below.decode_stored(below, span, start, stop, out)
            stored = np.empty(0, np.uint16), np.empty(0, np.uint32), len(LOOP_DTYPES)
        first, last = self._span(*span)
        lefts = [[_view_numpy(piece, term.left) for piece in left] for left, _, term in factors]
        rights = [_widen(_view_numpy(right, term.right)) for _, right, term in factors]
        chunks = [0]
        for term in (term for _, _, term in factors):
            for k, after in term.chunks():
                chunks.append(chunks[-1] + -(-(after - k) // _GROUP) * _GROUP)
        ends = np.array(chunks, np.int64)
        products = _zeros(2 * 4 * COLUMNS)
        for matrix, row, end in self._tiles(start, stop, self._step(chunks[-1])):
            left = np.zeros((-(-(end - row) // 4) * 4, chunks[-1]))
            slots = iter(chunks)
            for x, (_, _, term) in zip(lefts, factors, strict=True):
                offset = matrix * self.rows + row - first
                if len(x) > 1:  # a piece for each rank
                    own = np.stack([piece[offset : offset + end - row] for piece in x], axis=1)
                else:
                    own = _view_left(x[0], term, matrix, row, end, offset, last - first)
                rows = _widen(own) * np.float64(term.scale)
                for k, after in term.chunks():
                    slot = next(slots)
                    left[: end - row, slot : slot + after - k] = rows[:, k:after]
            _round_numpy(left, chunks, 1)
            for column in range(0, self.columns, COLUMNS):
                width = min(COLUMNS, self.columns - column)
                right = _zeros(chunks[-1] * COLUMNS).reshape(-1, COLUMNS)
                slots = iter(chunks)
                for y, (_, _, term) in zip(rights, factors, strict=True):
                    columns = _view(y, term.right, matrix, (0, term.rank), self.columns)
                    for k, after in term.chunks():
                        slot = next(slots)
                        right[slot : slot + after - k, :width] = columns[k:after, column : column + width]
                _round_numpy(right, chunks, 0)
                place = (matrix * self.rows + row) * self.columns + column - start
                low_rank_loops.add_products(
                    left.ravel(), right.ravel(), ends, end - row, width, self.columns, place, *stored, out, products
                )

    def compile_loops(self) -> None:
        """Add an update of rank 1 to two ones.

        Raises:
            RuntimeError: the sums are wrong.
        """
        self.below.compile_loops()
        factor = Factor("float32", (0, 1, 1), is_whole=True)
        ones = np.ones(2, np.float32).data.cast("B")
        out = np.zeros(2, np.float32)
        tiny = LowRankUpdate(Plain("float32"), 1, 2, (Term(1, 2.0, factor, factor),))
        tiny.decode_stored([ones, ones, ones], (0, 2), 0, 2, out)
        if out.tolist() != [3, 3]:
            raise RuntimeError(f"1 + 2 * 1 is {out.tolist()}")

    def _split(self, pieces: Sequence[Any]) -> tuple[Sequence[Any], list[tuple[Sequence[Any], Any, Term]]]:
        """Return the pieces of what is below, and those of each term: of the left factor, and the right one."""
        at = first = len(pieces) - sum(term.num_left + 1 for term in self.terms)
        factors = []
        for term in self.terms:
            factors.append((pieces[at : at + term.num_left], pieces[at + term.num_left], term))
            at += term.num_left + 1
        return pieces[:first], factors

    def _span(self, start: int, stop: int) -> tuple[int, int]:
        """Return the rows, counted through all matrices, that elements [start, stop) are in."""
        return start // self.columns, -(-stop // self.columns)

    def _step(self, ranks: int) -> int:
        """Return how many rows of the left factors are at hand at once."""
        return max(CHUNK, _LEFT_ELEMENTS // max(1, ranks))

    def _tiles(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int, int]]:
        """Yield matrix and rows [first, last) in it of the tiles that cover elements [start, stop)."""
        row, last = self._span(start, stop)
        while row < last:
            matrix = row // self.rows
            end = min(row + step, last, (matrix + 1) * self.rows)
            yield matrix, row - matrix * self.rows, end - matrix * self.rows
            row = end


def _zeros(num_elements: int) -> NDArray[np.float64]:
    """Return zeros that begin at a cache line, from where loops read a fifth faster."""
    room = np.zeros(num_elements + 8)
    start = -(room.ctypes.data // 8) % 8
    return room[start : start + num_elements]


def _view_left(x: Any, term: Term, matrix: int, row: int, end: int, offset: int, num_rows: int) -> Any:
    """Return rows of a left factor: rows x rank."""
    if term.left.is_whole:
        return _view(x, term.left, matrix, (row, end), term.rank)
    if term.num_left > 1:
        return x.reshape(term.rank, num_rows)[:, offset : offset + end - row].T
    return x.reshape(num_rows, term.rank)[offset : offset + end - row]


def _view(x: Any, factor: Factor, matrix: int, rows: tuple[int, int], columns: int) -> Any:
    """Return rows [start, stop) of one matrix of a factor that is all there, without a copy."""
    of_matrix, of_row, of_column = factor.strides
    shape, offset = (rows[1] - rows[0], columns), matrix * of_matrix + rows[0] * of_row
    if isinstance(x, np.ndarray):
        nbytes = x.itemsize
        return np.lib.stride_tricks.as_strided(
            x[offset:], shape, (of_row * nbytes, of_column * nbytes), writeable=False
        )
    return x.as_strided(shape, (of_row, of_column), x.storage_offset() + offset)


def _view_numpy(piece: memoryview, factor: Factor) -> NDArray[Any]:
    """Return stored values without a copy, as words where numpy does not know their dtype."""
    return np.frombuffer(piece, np.uint16 if factor.dtype == "bfloat16" else factor.dtype)


def _widen(values: NDArray[Any]) -> NDArray[Any]:
    """Return bfloat16 values, which come as words, as float32, and others as they are."""
    return widen(values) if values.dtype == np.uint16 else values


def _read_torch(piece: torch.Tensor, factor: Factor) -> torch.Tensor:
    return piece.view(find_dtype(factor.dtype))


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))


def _round_torch(x: torch.Tensor, dim: int) -> torch.Tensor:
    """Round values to 23 bits of the largest of their row (dim 1) or column (dim 0)."""
    largest = x.abs().nan_to_num(0.0, float("inf")).amax(dim, keepdim=True)
    magic = (largest.view(torch.int64) & _EXPONENT).view(torch.float64) * _MAGIC
    return (x + magic) - magic


def _round_numpy(x: NDArray[np.float64], ends: Sequence[int], axis: int) -> None:
    """Do the same in place, chunk by chunk of ranks."""
    for start, stop in pairwise(ends):
        part = x[:, start:stop] if axis else x[start:stop]
        with np.errstate(all="ignore"):  # values that are not finite
            largest = np.fmax.reduce(np.abs(part), axis, keepdims=True)
            magic = (largest.view(np.int64) & _EXPONENT).view(np.float64) * _MAGIC
            part += magic
            part -= magic
