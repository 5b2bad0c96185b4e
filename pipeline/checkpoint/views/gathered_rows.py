"""Matrices whose rows come from several stored ones: embeddings and heads in another vocabulary."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymerge.ops.decoders.decoder import Decoder, Plain
from raymerge.ops.decoders.rows import MEAN, PAD, GatherRows, RowMap, lay_out
from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.stores.files import ALIGNMENT, ByteRange, ByteRows
from raymerge.pipeline.urls import scheme_of

_FEW_RUNS, _LONG_RUN = 1000, 32
"""Rows in so few runs, or in runs of so many rows on average, do not count as scattered."""

PLACE_NBYTES = 3 * ALIGNMENT
"""Taken for each row of a window to know where it lies. Measured with 150,000 rows of two sources: 60 to 100."""


@dataclass(frozen=True, slots=True)
class RowsOfParts(Source):
    """One tensor whose rows are those of other tensors, in whatever order."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[Source, ...]
    """Tensors with rows of one length."""
    rows: RowMap = field(repr=False)
    padding: bytes = field(default=b"", repr=False)
    """The mean of all rows before the padding, as float32; empty until it is known, and where there is no padding."""

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.num_elements // max(1, self.shape[0])

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all parts."""
        return tuple(dict.fromkeys(tensor for part in self.parts for tensor in part.origins))

    @property
    def identity(self) -> Identity:
        """The parts, and which rows of them."""
        return ["rows", self.rows.digest, [part.identity for part in self.parts]]

    def max_rows(self, num_elements: int) -> int:
        """Return how many rows of parts so many elements take at most: their own, and those that means take besides."""
        rows = num_elements // self.columns + 2
        largest = max((len(mean) - 1 for mean in self.rows.means), default=0)
        return rows + min(rows * largest, self.rows.num_extra)


@dataclass(frozen=True, slots=True)
class GatheredRows(RowsOfParts):
    """One tensor whose rows are stored in others; zeros, or means of several."""

    is_by_row: bool = False
    """Whether rows are read by themselves, to where the result has them."""

    @property
    def decoder(self) -> GatherRows:
        """Decoder that gathers them."""
        num_pieces = tuple(len(part.ranges(0, 1)) for part in self.parts)
        parts = tuple(part.decoder for part in self.parts)
        return GatherRows(parts, num_pieces, self.rows, self.columns, self.padding, self.is_by_row)

    @property
    def nbytes(self) -> int:
        """Bytes that are read: of each row once, or wherever the result has it; and for the mean that padding is."""
        if self.is_by_row:
            return sum(rows.nbytes for rows in self.find_rows(0, self.num_elements))
        spans = lay_out(self.rows, 0, self.shape[0]).spans
        row_nbytes = [sum(piece.nbytes for piece in part.ranges(0, self.columns)) for part in self.parts]
        total = sum(count * row_nbytes[part] for part, _, count in spans)
        return total * 2 if self.rows.num_pad else total

    @property
    def is_scattered(self) -> bool:
        """Whether neighbouring rows come from all over, so that it is better read as a whole."""
        num_runs = len(self.rows.table)
        return num_runs > _FEW_RUNS and self.shape[0] < num_runs * _LONG_RUN

    @property
    def has_means(self) -> bool:
        """Whether some rows are means of others."""
        kinds = self.rows.table[:, 1]
        return bool(((kinds == MEAN) | (kinds == PAD)).any())

    @property
    def can_be_by_row(self) -> bool:
        """Whether rows may be read by themselves: all are stored, alike, in files of this machine."""
        is_stored = all(isinstance(part, StoredTensor) for part in self.parts)
        return is_stored and not self.has_means and len(self.plain_dtypes) == 1 and not self.is_remote

    @property
    def is_remote(self) -> bool:
        """Whether some of its bytes are in stores, where a request costs more than the bytes between two rows."""
        return any(scheme_of(tensor.file.url) != "file" for tensor in self.origins)

    @property
    def plain_dtypes(self) -> frozenset[str]:
        """The dtypes that stored values are gathered in without torch, by its words; none where they are not plain."""
        decoders: list[Decoder] = [part.decoder for part in self.parts]
        found = {decoder.dtype for decoder in decoders if isinstance(decoder, Plain)}
        if not all(isinstance(decoder, Plain) for decoder in decoders):
            return frozenset()
        return frozenset({*found, "float32"} if len(found) > 1 or self.has_means else found)

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges of whole rows, each once, in the order of the parts."""
        columns = self.columns
        layout = lay_out(self.rows, start // columns, -(-stop // columns))
        return tuple(
            piece
            for part, row, count in layout.spans
            for piece in self.parts[part].ranges(row * columns, (row + count) * columns)
        )

    def find_rows(self, start: int, stop: int) -> tuple[ByteRows, ...]:
        """Return the rows of each part that has some of elements [start, stop), in the order of the result."""
        columns = self.columns
        parts, there = self.rows.spread(start // columns, -(-stop // columns))
        found = []
        for part in np.unique(parts[parts >= 0]).tolist():
            (first,) = self.parts[part].ranges(0, columns)
            starts = first.start + there[parts == part].astype(np.int64) * first.nbytes
            found.append(ByteRows(first.file, starts, first.nbytes))
        return tuple(found)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of as many rows, each by itself, of those that means take besides, and of where all lie."""
        row_nbytes = max((part.max_nbytes(self.columns) for part in self.parts), default=0)
        return self.max_rows(num_elements) * (row_nbytes + PLACE_NBYTES)
