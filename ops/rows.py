"""Rows of a matrix gathered from several others: which one each comes from, and how it is decoded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

ZERO, MEAN, PAD = -1, -2, -3
"""In place of a part: a row of zeros, the mean of rows of several parts, the mean of all rows before."""


@dataclass(frozen=True, slots=True)
class Run:
    """Neighbouring rows of the result that are neighbours where they come from."""

    start: int
    """First row of the result."""
    stop: int
    """Row after the last."""
    part: int
    """Which matrix they come from, or `ZERO`, `MEAN`, `PAD`."""
    row: int
    """First row there; of `MEAN`, which of the means."""
    piece: int
    """Pieces of bytes that the runs before take."""


@dataclass(frozen=True, slots=True)
class RowMap:
    """Where each row comes from; a few numbers for each run, so that it is small and travels well."""

    num_rows: int
    runs: bytes = field(repr=False)
    """Rows of four int32 numbers: start, part, row, piece."""
    means: tuple[tuple[tuple[int, int], ...], ...] = field(repr=False)
    """Of each mean the rows that it is taken over, as part and row."""

    @property
    def digest(self) -> str:
        """Equal for two maps only if they are."""
        return sha256(repr((self.num_rows, self.means)).encode() + self.runs).hexdigest()

    @property
    def table(self) -> NDArray[Any]:
        """The runs as numbers."""
        return np.frombuffer(self.runs, np.int32).reshape(-1, 4)

    @property
    def num_pad(self) -> int:
        """Rows of padding, which are the last ones."""
        table = self.table
        return self.num_rows - int(table[-1, 0]) if len(table) and table[-1, 1] == PAD else 0

    @property
    def num_extra(self) -> int:
        """Rows that are read besides one for each row, for means."""
        return sum(len(rows) - 1 for rows in self.means)

    def between(self, start: int, stop: int) -> Iterator[Run]:
        """Yield the runs that rows [start, stop) of the result lie in, whole."""
        table = self.table
        starts = table[:, 0]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        ends = [*starts[first + 1 : last + 1].tolist(), self.num_rows]
        for (begin, part, row, piece), end in zip(table[first:last].tolist(), ends, strict=False):
            yield Run(begin, end, part, row, piece)


def make_row_map(
    parts: NDArray[Any], rows: NDArray[Any], means: Sequence[Sequence[tuple[int, int]]], num_pieces: Sequence[int]
) -> RowMap:
    """Return the map of a matrix of `len(parts)` rows.

    Args:
        parts: for each row, which matrix it comes from, or `ZERO`, `MEAN`, `PAD`.
        rows: for each row, its row there; of `MEAN`, which of the means.
        means: of each the rows that it is taken over, as part and row.
        num_pieces: for each part, the pieces of bytes that neighbouring rows of it take.
    """
    steps = np.where(parts >= 0, 1, 0)  # in runs of zeros and padding, the row stays the same
    is_new = np.ones(len(parts), bool)
    is_new[1:] = (parts[1:] != parts[:-1]) | (rows[1:] != rows[:-1] + steps[1:]) | (parts[1:] == MEAN)
    starts = np.flatnonzero(is_new)
    found = parts[starts]
    taken = np.zeros(len(starts), np.int64)
    for part, number in enumerate(num_pieces):
        taken[found == part] = number
    for k in np.flatnonzero(found == MEAN):
        taken[k] = sum(num_pieces[part] for part, _ in means[rows[starts[k]]])
    before = np.concatenate([[0], np.cumsum(taken)[:-1]])
    table = np.stack([starts, found, rows[starts], before], axis=1).astype(np.int32)
    return RowMap(len(parts), table.tobytes(), tuple(tuple(mean) for mean in means))


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

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the size of a row for a mean, and of stored values that are put together."""
        below = max((part.temporary_nbytes(num_elements) for part in self.parts), default=0)
        return below + 4 * (num_elements + self.columns)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Decode each run by its part's decoder."""
        columns = self.columns
        runs = self.rows.between(start // columns, -(-stop // columns))
        first = next(self.rows.between(raw.start // columns, raw.start // columns + 1), None)
        skipped = first.piece if first else 0
        plain = _Plain()
        for run in runs:
            low, high = max(run.start * columns, raw.start), min(run.stop * columns, raw.stop)
            begin, end = max(low, start), min(high, stop)
            piece = run.piece - skipped
            values = out[begin - start : end - start]
            if run.part >= 0 and isinstance(decoder := self.parts[run.part], Plain):
                plain.add(raw.pieces[piece], decoder, begin - low, values)
                continue
            plain.flush()
            if run.part >= 0:
                shift = (run.row - run.start) * columns
                self._decode(run.part, shift, raw.pieces, piece, low, high, begin, values)
            elif run.part == MEAN:
                self._average(run, raw.pieces, piece, low, high, begin, values)
            elif run.part == PAD:
                row = torch.frombuffer(bytearray(self.padding), dtype=torch.float32).to(values.device)
                values.copy_(row[torch.arange(begin, end, device=values.device) % columns])
            else:
                values.zero_()
        plain.flush()
        return out

    def _decode(
        self,
        part: int,
        shift: int,
        pieces: Sequence[torch.Tensor],
        piece: int,
        low: int,
        high: int,
        begin: int,
        out: torch.Tensor,
    ) -> None:
        """Write what a part's decoder makes of elements that lie `shift` further on there."""
        raw = Raw(pieces[piece : piece + self.num_pieces[part]], low + shift, high + shift)
        self.parts[part].decode(raw, begin + shift, begin + shift + len(out), out)

    def _average(
        self,
        run: Run,
        pieces: Sequence[torch.Tensor],
        piece: int,
        low: int,
        high: int,
        begin: int,
        out: torch.Tensor,
    ) -> None:
        rows = self.rows.means[run.row]
        other = torch.empty_like(out)
        for number, (part, row) in enumerate(rows):
            shift = (row - run.start) * self.columns
            self._decode(part, shift, pieces, piece, low, high, begin, other if number else out)
            if number:
                out.add_(other)
            piece += self.num_pieces[part]
        out.div_(len(rows))


class _Plain:
    """Neighbouring runs of plain values of one dtype, which are converted together."""

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
        first = self._outs[0]
        count = sum(map(len, self._outs))
        first.as_strided((count,), (1,)).copy_(stored.view(find_dtype(self._dtype)))
        self._pieces, self._outs = [], []
