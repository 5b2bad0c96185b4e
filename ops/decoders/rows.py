"""Rows of a matrix gathered from several others: which one each comes from, and how it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

ZERO, MEAN, PAD = -1, -2, -3
"""In place of a part: a row of zeros, the mean of rows of several parts, the mean of all rows before."""

_DENSE = 16
"""A table of all numbers up to the largest is quicker than sorting where there are so many times fewer numbers."""


@dataclass(frozen=True, slots=True)
class RowMap:
    """The origin of each row: a few numbers for each run of neighbours, so that it is small and travels well."""

    num_rows: int
    runs: bytes = field(repr=False)
    """Three int32 numbers for each run: its first row, the part or `ZERO`, `MEAN`, `PAD`, and the first row there; of
    `MEAN`, which of the means."""
    means: tuple[tuple[tuple[int, int], ...], ...] = field(repr=False)
    """The rows that each mean is taken over, as part and row."""

    @property
    def digest(self) -> str:
        """Equal for two maps only if they are."""
        return sha256(repr((self.num_rows, self.means)).encode() + self.runs).hexdigest()

    @property
    def table(self) -> NDArray[Any]:
        """The runs as numbers."""
        return np.frombuffer(self.runs, np.int32).reshape(-1, 3)

    @property
    def num_pad(self) -> int:
        """Rows of padding, which are the last ones."""
        table = self.table
        return self.num_rows - int(table[-1, 0]) if len(table) and table[-1, 1] == PAD else 0

    @property
    def num_extra(self) -> int:
        """Rows that are read besides one for each row, for means."""
        return sum(len(rows) - 1 for rows in self.means)

    def spread(self, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return part and row there of each row of [start, stop)."""
        table = self.table
        starts = table[:, 0]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        begins = np.maximum(starts[first:last], start)
        counts = np.diff(np.append(begins, stop))
        parts = np.repeat(table[first:last, 1], counts)
        firsts = table[first:last, 2] + np.where(table[first:last, 1] >= 0, begins - starts[first:last], 0)
        within = np.arange(stop - start) - np.repeat(begins - start, counts)
        return parts, np.repeat(firsts, counts) + np.where(parts >= 0, within, 0)


def make_row_map(parts: NDArray[Any], rows: NDArray[Any], means: Sequence[Sequence[tuple[int, int]]]) -> RowMap:
    """Return the map of a matrix of `len(parts)` rows.

    Args:
        parts: for each row, which matrix it comes from, or `ZERO`, `MEAN`, `PAD`.
        rows: for each row, its row there; of `MEAN`, which of the means.
        means: of each the rows that it is taken over, as part and row.
    """
    is_new = np.ones(len(parts), bool)
    steps = np.where(parts[1:] >= 0, 1, 0)  # in runs of zeros and padding, the row stays the same
    is_new[1:] = (parts[1:] != parts[:-1]) | (rows[1:] != rows[:-1] + steps) | (parts[1:] == MEAN)
    starts = np.flatnonzero(is_new)
    table = np.stack([starts, parts[starts], rows[starts]], axis=1).astype(np.int32)
    return RowMap(len(parts), table.tobytes(), tuple(tuple(mean) for mean in means))


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A plan to read rows [start, ...) of the result: spans of neighbouring rows of the parts, each row once."""

    start: int
    parts: NDArray[Any]
    """For each row, its part, or `ZERO`, `MEAN`, `PAD`."""
    spans: Sequence[tuple[int, int, int]]
    """Part, first row and number of rows, in the order in which they are read."""
    span: NDArray[Any]
    """For each row that is one of a part, which span it is in."""
    index: NDArray[Any]
    """For each row that is one of a part, which row of the span."""
    means: dict[int, list[tuple[int, int]]]
    """For each row that is a mean, by its number from `start`, the span and the row of it of each that it is of."""


def lay_out(rows: RowMap, start: int, stop: int) -> Layout:
    """Return how rows [start, stop) are read."""
    parts, there = rows.spread(start, stop)
    is_plain = parts >= 0
    means = {int(k): rows.means[there[k]] for k in np.flatnonzero(parts == MEAN)}
    members = np.array([member for mean in means.values() for member in mean], np.int64).reshape(-1, 2)
    all_parts = np.concatenate([parts[is_plain], members[:, 0]])
    all_rows = np.concatenate([there[is_plain], members[:, 1]])
    if not len(all_parts):
        nothing = np.zeros(len(parts), np.int64)
        return Layout(start, parts, [], nothing, nothing, {})
    # one number for each row of each part, with one between parts, so that no two of them are neighbours
    most = np.full(int(all_parts.max()) + 1, -1, np.int64)
    np.maximum.at(most, all_parts, all_rows)
    bases = np.concatenate([[0], np.cumsum(most + 2)[:-1]])
    needed, places = _rank(bases[all_parts] + all_rows)
    is_first = np.diff(needed, prepend=-2) != 1
    firsts = np.flatnonzero(is_first)
    number = np.cumsum(is_first) - 1
    of_span = np.searchsorted(bases, needed[firsts], side="right") - 1
    counts = np.diff(np.append(firsts, len(needed)))
    spans = list(zip(of_span.tolist(), (needed[firsts] - bases[of_span]).tolist(), counts.tolist(), strict=True))
    found = number[places]
    within = places - firsts[found]
    first = len(found) - len(members)
    span, index = np.zeros((2, len(parts)), np.int64)
    span[is_plain], index[is_plain] = (found[:first], within[:first])
    rest = iter(zip(found[first:].tolist(), within[first:].tolist(), strict=True))
    return Layout(start, parts, spans, span, index, {k: [next(rest) for _ in mean] for k, mean in means.items()})


def lay_out_by_row(rows: RowMap, start: int, stop: int) -> Layout:
    """Return how rows [start, stop), of which none is a mean, are read by themselves: a span has all rows of a part.

    They are in it in the order of the result; the first row of a span means nothing.
    """
    parts, _ = rows.spread(start, stop)
    spans = []
    span, index = np.zeros((2, len(parts)), np.int64)
    for number, part in enumerate(np.unique(parts[parts >= 0]).tolist()):
        places = np.flatnonzero(parts == part)
        span[places], index[places] = number, np.arange(len(places))
        spans.append((part, 0, len(places)))
    return Layout(start, parts, spans, span, index, {})


def _rank(keys: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return the distinct numbers in order, and the place of each among them."""
    if (keys[1:] > keys[:-1]).all():
        return keys, np.arange(len(keys))
    if keys.max() >= _DENSE * len(keys):
        return np.unique(keys, return_inverse=True)
    is_there = np.zeros(int(keys.max()) + 1, bool)
    is_there[keys] = True
    return np.flatnonzero(is_there), (np.cumsum(is_there) - 1)[keys]


@dataclass(frozen=True, slots=True)
class GatherRows(Decoder):
    """Rows from several matrices; every mean is added up in float32, in the order of the models."""

    parts: tuple[Decoder, ...]
    num_pieces: tuple[int, ...]
    """For each part, the pieces of bytes that neighbouring rows of it take."""
    rows: RowMap
    columns: int
    padding: bytes = field(repr=False)
    """The mean of all rows, as float32; empty where there is no padding."""
    is_by_row: bool = False
    """Whether rows have been read as `lay_out_by_row` says; all parts are plain then."""

    def lay_out(self, start: int, stop: int) -> Layout:
        """Return how the rows that elements [start, stop) are in were read."""
        find = lay_out_by_row if self.is_by_row else lay_out
        return find(self.rows, start // self.columns, -(-stop // self.columns))

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the size of a row for a mean, and of stored values that are put together."""
        below = max((part.temporary_nbytes(num_elements) for part in self.parts), default=0)
        return below + 4 * (num_elements + self.columns)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Decode neighbouring rows by their part's decoder."""
        columns = self.columns
        layout = raw.memo.get("rows")
        if layout is None:
            layout = raw.memo["rows"] = self.lay_out(raw.start, raw.stop)
        pieces = _Pieces(self, layout, raw.pieces)
        plain = _Plain()
        first_row = start // columns
        for row, end_row in _cut(layout, first_row - layout.start, -(-stop // columns) - layout.start):
            low = max((layout.start + row) * columns, start)
            values = out[low - start : min((layout.start + end_row) * columns, stop) - start]
            column = low - (layout.start + row) * columns
            part = int(layout.parts[row])
            if part >= 0:
                pieces.decode(int(layout.span[row]), int(layout.index[row]) * columns + column, values, plain)
                continue
            plain.flush()
            if part == MEAN:
                other = torch.empty_like(values)
                for number, (span, index) in enumerate(layout.means[row]):
                    pieces.decode(span, index * columns + column, other if number else values)
                    if number:
                        values.add_(other)
                values.div_(len(layout.means[row]))
            elif part == PAD:
                padding = torch.frombuffer(bytearray(self.padding), dtype=torch.float32).to(values.device)
                values.copy_(padding[(torch.arange(len(values), device=values.device) + column) % columns])
            else:
                values.zero_()
        plain.flush()
        return out


def _cut(layout: Layout, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """Yield neighbouring rows of [start, stop) that are neighbours in one span, too."""
    parts, span, index = (values[start:stop] for values in (layout.parts, layout.span, layout.index))
    is_new = parts[1:] != parts[:-1]
    is_new |= (parts[1:] >= 0) & ((span[1:] != span[:-1]) | (index[1:] != index[:-1] + 1))
    is_new |= parts[1:] == MEAN
    starts = [0, *(np.flatnonzero(is_new) + 1).tolist(), stop - start]
    for begin, end in pairwise(starts):
        yield start + begin, start + end


class _Pieces:
    """The bytes of spans."""

    def __init__(self, decoder: GatherRows, layout: Layout, pieces: Sequence[torch.Tensor]) -> None:
        self._decoder = decoder
        self._layout = layout
        self._pieces = pieces
        numbers = (decoder.num_pieces[part] for part, _, _ in layout.spans)
        is_single = all(number == 1 for number in decoder.num_pieces)
        self._firsts = range(len(layout.spans)) if is_single else [0, *accumulate(numbers)]

    def decode(self, span: int, skipped: int, out: torch.Tensor, plain: _Plain | None = None) -> None:
        """Write the values of a span after so many that are skipped; plain ones perhaps later, with others."""
        part, row, count = self._layout.spans[span]
        decoder, columns = self._decoder.parts[part], self._decoder.columns
        first = self._firsts[span]
        if plain is not None and isinstance(decoder, Plain):
            plain.add(self._pieces[first], decoder, skipped, out)
            return
        start = row * columns
        raw = Raw(self._pieces[first : first + self._decoder.num_pieces[part]], start, start + count * columns)
        decoder.decode(raw, start + skipped, start + skipped + len(out), out)


class _Plain:
    """Neighbouring rows of plain values of one dtype, which are converted together."""

    def __init__(self) -> None:
        self._pieces: list[torch.Tensor] = []
        self._outs: list[torch.Tensor] = []
        self._dtype = ""

    def add(self, piece: torch.Tensor, decoder: Plain, skipped: int, out: torch.Tensor) -> None:
        """Take the values of a piece after so many that are skipped."""
        if decoder.dtype != self._dtype:
            self.flush()
            self._dtype = decoder.dtype
        nbytes = find_dtype(decoder.dtype).itemsize
        self._pieces.append(piece[skipped * nbytes : (skipped + len(out)) * nbytes])
        self._outs.append(out)

    def flush(self) -> None:
        """Convert them."""
        if not self._pieces:
            return
        stored = self._pieces[0] if len(self._pieces) == 1 else torch.cat(self._pieces)
        count = sum(map(len, self._outs))
        self._outs[0].as_strided((count,), (1,)).copy_(stored.view(find_dtype(self._dtype)))
        self._pieces, self._outs = [], []
