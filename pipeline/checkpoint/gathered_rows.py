"""Matrices whose rows come from several stored ones: embeddings and heads in another vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymerge.ops.decoder import Decoder
from raymerge.ops.rows import MEAN, GatherRows, RowMap, Run
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.stores.files import ALIGNMENT, ByteRange


@dataclass(frozen=True, slots=True)
class GatheredRows(Source):
    """One tensor whose rows are those of others, in whatever order; zeros, or means of several."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Source, ...]
    """Of equal rows."""
    rows: RowMap = field(repr=False)
    padding: bytes = field(default=b"", repr=False)
    """The mean of all rows before the padding, as float32; empty until it is known, and where there is no padding."""

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.num_elements // max(1, self.shape[0])

    @property
    def decoder(self) -> Decoder:
        """Decoder that gathers them."""
        return GatherRows(
            tuple(part.decoder for part in self.parts), count_pieces(self.parts), self.rows, self.columns, self.padding
        )

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all parts."""
        return tuple(dict.fromkeys(tensor for part in self.parts for tensor in part.origins))

    @property
    def identity(self) -> Identity:
        """The parts, and which rows of them."""
        return ["rows", self.rows.digest, [part.identity for part in self.parts]]

    @property
    def nbytes(self) -> int:
        """Bytes that are read: of each row, of all those that means are taken over, and all once more for padding."""
        table = self.rows.table
        stops = [*table[1:, 0].tolist(), self.rows.num_rows]
        total = sum(self._row_nbytes(part) for mean in self.rows.means for part, _ in mean)
        counts = [0] * len(self.parts)
        for start, part, stop in zip(table[:, 0].tolist(), table[:, 1].tolist(), stops, strict=True):
            if part >= 0:
                counts[part] += stop - start
        total += sum(count * self._row_nbytes(part) for part, count in enumerate(counts))
        return total * 2 if self.rows.num_pad else total

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges of each run, in order."""
        columns = self.columns
        found: list[ByteRange] = []
        for run in self.rows.between(start // columns, -(-stop // columns)):
            low, high = max(run.start * columns, start), min(run.stop * columns, stop)
            for part, row in self._rows_of(run):
                shift = (row - run.start) * columns
                found += self.parts[part].ranges(low + shift, high + shift)
        return tuple(found)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of as many rows, each by itself, and of those that means take besides."""
        rows = num_elements // self.columns + 2
        largest = max((len(mean) - 1 for mean in self.rows.means), default=0)
        extra = min(rows * largest, self.rows.num_extra)
        return (rows + extra) * max((part.max_nbytes(self.columns) for part in self.parts), default=ALIGNMENT)

    def _rows_of(self, run: Run) -> tuple[tuple[int, int], ...]:
        if run.part == MEAN:
            return self.rows.means[run.row]
        return ((run.part, run.row),) if run.part >= 0 else ()

    def _row_nbytes(self, part: int) -> int:
        return sum(piece.nbytes for piece in self.parts[part].ranges(0, self.columns))


def count_pieces(parts: tuple[Source, ...]) -> tuple[int, ...]:
    """Return for each part the ranges that neighbouring rows of it take."""
    return tuple(len(part.ranges(0, 1)) for part in parts)
