"""Low-rank updates: a matrix plus products of two thin ones, as LoRA adapters store them.

Arithmetic is float32 in a fixed order: products are added up in groups of four ranks, groups in chunks, and chunks one
after the other, each product and each sum rounded. So the bits do not depend on blocks, threads, processors or
libraries, and errors are those of a good matrix product in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.lazy import low_rank_loops, np, torch
from raymerge.ops.stored import LOOP_DTYPES, find_memory, item_nbytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

CHUNK = 64
"""Ranks whose products are added up by themselves; several updates are counted through."""

COLUMNS = 512
"""Most columns of the right factors that loops have at hand at once."""

TILE_COLUMNS = 16
"""Columns of the tiles that loops make products of: a register of 512 bits, or several that are shorter."""

BAND_ROWS = 64
"""Rows of a product that loops make at once: of a chunk they stay in a core's first cache, with a strip of columns, and
all of their sums in its second."""

WIDE = len(LOOP_DTYPES)
"""Number by which loops know float64."""

_GROUP = 4
"""Ranks whose products are added to each other first; ranks and rows are filled up with zeros to a multiple of it."""

_LEFT_ELEMENTS = 2**21
"""Most elements of left factors held at once, in float32; right ones are converted again for each lot."""
_MOST_ROWS = 1024
"""Most rows of the left factors at hand, so that the sums of a product stay near a core."""
_PIECE_NBYTES = 400
"""Taken for what loops are told of the place of a factor, or of each rank of one."""
_PANEL_ELEMENTS = 2**20
"""Elements of right factors that loops have at hand at once, unless there are very many ranks."""
_TILE_ELEMENTS = {"cpu": 2**17, "cuda": 2**22}
"""Elements of a product that torch makes at once, on each kind of device."""


@dataclass(frozen=True, slots=True)
class Factor:
    """The storage of one factor of an update."""

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


@dataclass(frozen=True, slots=True)
class LowRankUpdate(Decoder):
    """Values of a matrix, or a stack of them, plus the sum of terms, which is rounded before."""

    below: Decoder
    rows: int
    """Rows of each matrix."""
    columns: int
    terms: tuple[Term, ...]

    @property
    def has_loops(self) -> bool:
        """Return whether there are loops for what is below."""
        return self.below.has_loops

    @property
    def ranks(self) -> int:
        """Ranks of all terms together."""
        return sum(term.rank for term in self.terms)

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the room for parts of both factors and of the product."""
        rows = num_elements // self.columns + 2
        largest = max(term.rank for term in self.terms)
        at_hand = min(self.rows, self._step()) + _GROUP  # loops decode whole windows
        left = at_hand * ((self.ranks + _GROUP) * 4 + largest * 16) + rows * self.ranks * 4
        tile = 5 * min(rows * self.columns, max(*_TILE_ELEMENTS.values(), self.columns)) * 4
        width = self._find_width()
        panel = (_fill(self.ranks, CHUNK) + 2 * BAND_ROWS) * width * 4 + max(_MOST_ROWS, width, largest) * 4
        panel += sum(term.num_left + 1 for term in self.terms) * _PIECE_NBYTES
        return self.below.temporary_nbytes(num_elements) + left + max(tile + 2 * self.columns * 4, panel)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Add the terms, a tile of whole rows at a time."""
        below, factors = self._split(raw.pieces)
        self.below.decode(Raw(below, raw.start, raw.stop), start, stop, out)
        first, last = self._span(raw.start, raw.stop)
        lefts = [_join([_read_torch(piece, term.left) for piece in left]) for left, _, term in factors]
        rights = [_read_torch(right, term.right) for _, right, term in factors]
        most = _TILE_ELEMENTS.get(out.device.type, _TILE_ELEMENTS["cpu"])
        for matrix, row, end in self._tiles(start, stop, max(1, most // self.columns)):
            total, part, *products = torch.zeros(5, end - row, self.columns, dtype=torch.float32, device=out.device)
            ranks: list[tuple[torch.Tensor, torch.Tensor]] = []
            for left, right, (_, _, term) in zip(lefts, rights, factors, strict=True):
                x = _view_left(left, term, matrix, row, end, matrix * self.rows + row - first, last - first)
                y = _view(right, term.right, matrix, (0, term.rank), self.columns)
                scaled = (x.double() * term.scale).float()
                ranks += [(scaled[:, k : k + 1], y[k : k + 1]) for k in range(term.rank)]
            for number in range(0, len(ranks), _GROUP):
                part.add_(_add_group(ranks[number : number + _GROUP], products))
                if number + _GROUP >= len(ranks) or (number + _GROUP) % CHUNK == 0:
                    total.add_(part)
                    part.zero_()
            offset = (matrix * self.rows + row) * self.columns
            begin, finish = max(start, offset), min(stop, offset + total.numel())
            out[begin - start : finish - start].add_(total.view(-1)[begin - offset : finish - offset])
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
        memory, places = find_memory([piece for left, right, _ in factors for piece in (*left, right)])
        width = self._find_width()
        values = _zeros(max(_MOST_ROWS, width, *(term.rank for term in self.terms)))
        panel = _zeros(_fill(self.ranks, CHUNK) * width)
        totals, products = _zeros(BAND_ROWS * width), _zeros(BAND_ROWS * width)
        scales = np.array([term.scale for term in self.terms for _ in range(term.num_left)])
        at_hand = min(self._step(), max(1, last - first))
        ranks = _fill(self.ranks)
        room = _zeros(_fill(at_hand) * ranks)
        laid_out, terms = -1, np.empty((0, 9), np.int64)
        for matrix, row, end in self._tiles(start, stop, self._step()):
            if matrix != laid_out:
                laid_out, terms = matrix, self._lay_out(places, matrix, first, last)
            low_rank_loops.add_update(
                *memory, terms, scales, row, end - row, self.columns,
                (matrix * self.rows + row) * self.columns - start, *stored, out, values, ranks,
                room[: _fill(end - row) * ranks], panel, totals, products,
            )  # fmt: skip

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

    def _step(self) -> int:
        """Return how many rows of the left factors are at hand at once."""
        return max(CHUNK, min(_MOST_ROWS, _LEFT_ELEMENTS // self.ranks))

    def _find_width(self) -> int:
        """Return the columns that right factors are at hand of at once, so that all of their ranks stay in a cache."""
        most = max(CHUNK, _PANEL_ELEMENTS // max(1, self.ranks) // TILE_COLUMNS * TILE_COLUMNS)
        return min(COLUMNS, most, _fill(self.columns, TILE_COLUMNS))

    def _lay_out(self, places: Sequence[int], matrix: int, first: int, last: int) -> NDArray[np.int64]:
        """Return where loops find the factors of a matrix, as `add_update` takes them.

        Args:
            places: first bytes of the pieces of the terms.
            matrix: the number of it.
            first: row at hand, counted through all matrices.
            last: row after those at hand.
        """
        lines = []
        at = 0
        skipped = matrix * self.rows - first
        for term in self.terms:
            left, right, num_left = term.left, term.right, term.num_left
            form, item = _find_form(right.dtype)
            of_right = (right.strides[1], right.strides[2], form)
            begin = places[at + num_left] // item + matrix * right.strides[0]
            form, item = _find_form(left.dtype)
            for number in range(num_left):
                place = places[at + number] // item
                if left.is_whole:
                    of_left = (place + matrix * left.strides[0], left.strides[1], left.strides[2])
                elif num_left > 1:
                    of_left = (place + skipped, 1, last - first)
                else:
                    of_left = (place + skipped * term.rank, term.rank, 1)
                lines.append((term.rank // num_left, *of_left, form, begin + number * of_right[0], *of_right))
            at += num_left + 1
        return np.array(lines, np.int64)

    def _tiles(self, start: int, stop: int, step: int) -> Iterator[tuple[int, int, int]]:
        """Yield matrix and rows [first, last) in it of the tiles that cover elements [start, stop)."""
        row, last = self._span(start, stop)
        while row < last:
            matrix = row // self.rows
            end = min(row + step, last, (matrix + 1) * self.rows)
            yield matrix, row - matrix * self.rows, end - matrix * self.rows
            row = end


def _zeros(num_elements: int) -> NDArray[np.float32]:
    """Return zeros that begin at a cache line, from where loops read a fifth faster."""
    room = np.zeros(num_elements + 16, np.float32)
    start = -(room.ctypes.data // 4) % 16
    return room[start : start + num_elements]


def _fill(number: int, multiple: int = _GROUP) -> int:
    """Return how many rows, ranks or columns there are with those that fill them up.

    >>> _fill(1), _fill(8)
    (4, 8)
    """
    return -(-number // multiple) * multiple


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


def _find_form(dtype: str) -> tuple[int, int]:
    """Return by which number loops know a dtype, and the bytes of a value."""
    return (WIDE, 8) if dtype == "float64" else (LOOP_DTYPES.index(dtype), item_nbytes(dtype))


def _read_torch(piece: torch.Tensor, factor: Factor) -> torch.Tensor:
    return piece.view(find_dtype(factor.dtype))


def _add_group(ranks: Sequence[tuple[torch.Tensor, torch.Tensor]], products: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of some products of a column and a row: (first + second) + (third + fourth), as far as they go."""
    first, other, second = products
    for number, (column, row) in enumerate(ranks):
        torch.mul(column, row.float(), out=(first, other, second, other)[number])
        if number % 2:
            (first, second)[number // 2].add_(other)
    return first.add_(second) if len(ranks) > 2 else first


def _join(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
