"""Both factors of a module in the adapter that is made, as one source."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymerge.ops.decoders.decoder import Decoder
from raymerge.ops.decoders.update_factors import JoinedTerms, MergedUpdates
from raymerge.pipeline.checkpoint.adapters.source import UpdatedTensor
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.stores.files import ByteRange


@dataclass(frozen=True, slots=True)
class FactorPair(Source):
    """The factors of a merged update: `a` (rank x columns) and then `b` (rows x rank), in one row."""

    model: str
    name: str
    """The module's."""
    dtype: str
    shape: tuple[int, ...]
    full: Source = field(repr=False)
    """The merged update, rows x columns: a sum of low-rank updates, or what a method makes of several."""
    rank: int

    @property
    def decoder(self) -> Decoder:
        """Decoder that makes the factors when the first of their values are asked for."""
        rows, columns = self.full.shape
        if isinstance(self.full, UpdatedTensor):
            return JoinedTerms(rows, columns, self.rank, tuple(update.term for update in self.full.updates))
        return MergedUpdates(rows, columns, self.rank, self.full.decoder)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Stored tensors of the merged update."""
        return self.full.origins

    @property
    def identity(self) -> Identity:
        """Identity of the merged update, and the rank."""
        return ["factors", self.rank, self.full.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return all bytes, whichever elements are asked for."""
        return self.full.ranges(0, self.full.num_elements)

    @property
    def fixed_nbytes(self) -> int:
        """Room of all bytes."""
        return self.full.max_nbytes(self.full.num_elements)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of all bytes."""
        return self.fixed_nbytes
