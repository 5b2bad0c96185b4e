"""Sources that are merges themselves: tensors of a document's output, and rows gathered from some."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from raymerge.ops.decoders.intermediate import Intermediate, cover
from raymerge.ops.decoders.merged_rows import GatherMergedRows, find_share
from raymerge.ops.decoders.rows import lay_out
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.checkpoint.views.gathered_rows import PLACE_NBYTES, RowsOfParts
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.files import ByteRange, aligned


@dataclass(frozen=True, slots=True)
class MergedTensor(Source):
    """A tensor of a document's output, merged from its own sources when it is decoded."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    merge: TensorMerge = field(repr=False)
    """The merge that makes it."""

    @property
    def decoder(self) -> Intermediate:
        """Decoder that merges."""
        (variant,) = self.merge.variants
        dtype = DTYPES[self.merge.written_dtype].torch_name
        num_whole = len(self.merge.sources) - self.merge.num_cut
        return Intermediate(variant.kernel, self.merge.site(variant), self.merge.sources, dtype, num_whole)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all sources."""
        return tuple(dict.fromkeys(tensor for source in self.merge.sources for tensor in source.origins))

    @property
    def identity(self) -> Identity:
        """The merge, and its sources."""
        (variant,) = self.merge.variants
        sources: Identity = [source.identity for source in self.merge.sources]
        return ["merge", self.merge.name, self.merge.op, repr(variant.parameters), variant.seed, self.dtype, sources]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return what the sources need for the whole blocks that hold the elements, source by source."""
        return tuple(
            piece for source, *span in self._find_spans(self.decoder, start, stop) for piece in source.ranges(*span)
        )

    def find_early(self, index: int, start: int, stop: int) -> tuple[bool, ...]:
        """Tell of each source's ranges: those that sources measure themselves come before those of the merge."""
        decoder = self.decoder
        if decoder.num_part_passes <= index < decoder.num_passes:
            return (True,) * len(self.ranges(start, stop))
        spans = self._find_spans(decoder, start, stop)
        return tuple(needed for source, *span in spans for needed in source.find_early(index, *span))

    def _find_spans(self, decoder: Intermediate, start: int, stop: int) -> Iterator[tuple[Source, int, int]]:
        """Yield each source with its elements that are needed for some."""
        bounds = cover(start, stop, decoder.grid, self.num_elements)
        for position, source in enumerate(self.merge.sources):
            yield source, *decoder.find_span(position, *bounds)

    @property
    def fixed_nbytes(self) -> int:
        """Return that of the sources."""
        return sum(source.fixed_nbytes for source in self.merge.sources)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of the whole blocks that hold so many elements, wherever they begin."""
        decoder = self.decoder
        most = min(self.num_elements, (-(-num_elements // decoder.grid) + 1) * decoder.grid)
        spans = [decoder.find_span(position, 0, most) for position in range(len(self.merge.sources))]
        return sum(
            source.max_nbytes(stop - start) for source, (start, stop) in zip(self.merge.sources, spans, strict=True)
        )

    def decoded_nbytes(self, num_elements: int) -> int:
        """Return the room for the values, and for those that loops make of the sources."""
        own = aligned(num_elements * DTYPES[self.merge.written_dtype].num_bits // 8)
        return own + sum(source.decoded_nbytes(num_elements) for source in self.merge.sources)


@dataclass(frozen=True, slots=True)
class MergedRows(RowsOfParts):
    """One tensor whose rows are those of others, of which at least one is a `MergedTensor`: see `GatheredRows`."""

    @property
    def decoder(self) -> GatherMergedRows:
        """Decoder that merges and gathers."""
        num_pieces = (0 if isinstance(part, MergedTensor) else len(part.ranges(0, 1)) for part in self.parts)
        return GatherMergedRows(self.parts, tuple(num_pieces), self.rows, self.columns, self.padding)

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the ranges of whole rows that are stored, and after them those of a share of each merge."""
        columns = self.columns
        layout = lay_out(self.rows, start // columns, -(-stop // columns))
        found = [
            piece
            for part, row, count in layout.spans
            if not isinstance(self.parts[part], MergedTensor)
            for piece in self.parts[part].ranges(row * columns, (row + count) * columns)
        ]
        for part in self.parts:
            if isinstance(part, MergedTensor):
                low, high = (find_share(bound, self.num_elements, part.shape[0], columns) for bound in (start, stop))
                found += part.ranges(low, high) if low < high else ()
        return tuple(found)

    @property
    def fixed_nbytes(self) -> int:
        """Return that of the merges."""
        return sum(part.fixed_nbytes for part in self.parts if isinstance(part, MergedTensor))

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of as many stored rows, each by itself, and of a share of each merge."""
        stored = (part.max_nbytes(self.columns) for part in self.parts if not isinstance(part, MergedTensor))
        total = self.max_rows(num_elements) * (max(stored, default=0) + PLACE_NBYTES)
        for part in self.parts:
            if isinstance(part, MergedTensor):
                total += part.max_nbytes(-(-num_elements * part.shape[0] // max(1, self.shape[0])) + 1)
        return total


def list_sources(merge: TensorMerge) -> Iterator[Source]:
    """Yield the sources of a merge, each before the sources that it is merged from itself."""
    for source in merge.sources:
        yield source
        if isinstance(source, MergedTensor):
            yield from list_sources(source.merge)
