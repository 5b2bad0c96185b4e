"""Tensors that an adapter changes: which bytes of its factors elements need."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.decoders.adapted import AddedVector, ScaledRows
from raymerge.ops.decoders.decoder import Decoder
from raymerge.ops.decoders.low_rank import Factor, LowRankUpdate, Term
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.stores.files import ByteRange, aligned


@dataclass(frozen=True, slots=True)
class Update:
    """One update of a tensor: its two factors and how they are stored."""

    term: Term
    left: StoredTensor
    right: StoredTensor
    is_turned: bool
    """Whether the tensor is inputs x outputs, so that the left factor is that of the inputs."""

    @property
    def is_by_rank(self) -> bool:
        """Return whether rows of the left factor are read as one range for each rank."""
        return self.term.num_left > 1

    @property
    def fixed_nbytes(self) -> int:
        """Room for factors that are read whole."""
        whole = [self.right, *([self.left] if self.term.left.is_whole else [])]
        return sum(aligned(factor.nbytes) for factor in whole)

    def ranges(self, first: int, last: int, num_rows: int) -> tuple[ByteRange, ...]:
        """Return the bytes that rows [first, last) of `num_rows` are made of."""
        left = self.left
        if self.term.left.is_whole:
            of_left = left.ranges(0, left.num_elements)
        elif self.is_by_rank:
            starts = range(0, left.num_elements, num_rows)
            of_left = tuple(piece for start in starts for piece in left.ranges(start + first, start + last))
        else:
            of_left = left.ranges(first * self.term.rank, last * self.term.rank)
        return (*of_left, *self.right.ranges(0, self.right.num_elements))

    def max_nbytes(self, num_rows: int) -> int:
        """Return the most room that so many rows take in a buffer."""
        if self.term.left.is_whole:
            return self.fixed_nbytes
        of_rank = aligned(num_rows * DTYPES[self.left.dtype].num_bits // 8)
        of_left = self.term.rank * of_rank if self.is_by_rank else self.left.max_nbytes(num_rows * self.term.rank)
        return of_left + self.fixed_nbytes

    @property
    def identity(self) -> Identity:
        """Everything that decides its values."""
        term = self.term
        strides: list[Identity] = [*term.left.strides, *term.right.strides]
        return [term.rank, term.scale.hex(), strides, self.left.identity, self.right.identity]


@dataclass(frozen=True, slots=True)
class UpdatedTensor(Source):
    """A matrix, or a stack of them, plus low-rank updates."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: Source
    num_rows: int
    """Rows of all matrices together."""
    num_matrices: int
    updates: tuple[Update, ...]

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.num_elements // self.num_rows

    @property
    def decoder(self) -> Decoder:
        """Values below plus the updates."""
        terms = tuple(update.term for update in self.updates)
        return LowRankUpdate(self.below.decoder, self.num_rows // self.num_matrices, self.columns, terms)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Stored tensors of the changed source, and of the factors."""
        factors = (factor for update in self.updates for factor in (update.left, update.right))
        return (*self.below.origins, *factors)

    @property
    def identity(self) -> Identity:
        """Identity of the changed source, and those of the updates."""
        return ["low rank", self.below.identity, self.num_matrices, [update.identity for update in self.updates]]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the bytes below, and those of each update's factors."""
        first, last = start // self.columns, -(-stop // self.columns)
        factors = (piece for update in self.updates for piece in update.ranges(first, last, self.num_rows))
        return (*self.below.ranges(start, stop), *factors)

    @property
    def fixed_nbytes(self) -> int:
        """Room for factors that are read whole."""
        return self.below.fixed_nbytes + sum(update.fixed_nbytes for update in self.updates)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the most room that so many elements take."""
        rows = min(num_elements // self.columns + 2, self.num_rows)
        return self.below.max_nbytes(num_elements) + sum(update.max_nbytes(rows) for update in self.updates)


@dataclass(frozen=True, slots=True)
class ReplacedTensor(Source):
    """A tensor that an adapter stores whole, in place of the model's own; its dtype stays the model's."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredTensor

    @property
    def decoder(self) -> Decoder:
        """Plain values of the adapter's dtype."""
        return self.stored.decoder

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The adapter's tensor."""
        return (self.stored,)

    @property
    def identity(self) -> Identity:
        """Identity of the adapter's tensor, and the dtype that it is taken for."""
        return ["replaced", self.dtype, self.stored.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the adapter's bytes."""
        return self.stored.ranges(start, stop)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the size of the elements as the adapter stores them."""
        return self.stored.max_nbytes(num_elements)


@dataclass(frozen=True, slots=True)
class RescaledTensor(Source):
    """A matrix whose rows get the norms that an adapter stores (DoRA)."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: Source
    norms: StoredTensor

    @property
    def columns(self) -> int:
        """Elements of a row."""
        return self.num_elements // self.shape[0]

    @property
    def decoder(self) -> Decoder:
        """Scaled rows of the values below."""
        return ScaledRows(self.below.decoder, self.columns, DTYPES[self.norms.dtype].torch_name)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Stored tensors of the changed source, and of the norms."""
        return (*self.below.origins, self.norms)

    @property
    def identity(self) -> Identity:
        """Identity of the changed source, and that of the norms."""
        return ["rescaled", self.below.identity, self.norms.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the bytes of whole rows below, and of their norms."""
        first, last = start // self.columns, -(-stop // self.columns)
        return (*self.below.ranges(first * self.columns, last * self.columns), *self.norms.ranges(first, last))

    @property
    def fixed_nbytes(self) -> int:
        """Room that is taken below."""
        return self.below.fixed_nbytes

    def max_nbytes(self, num_elements: int) -> int:
        """Return the most room that so many elements take, with the rest of their rows."""
        rows = min(num_elements // self.columns + 2, self.shape[0])
        return self.below.max_nbytes(rows * self.columns) + self.norms.max_nbytes(rows)


@dataclass(frozen=True, slots=True)
class ShiftedTensor(Source):
    """A bias plus an adapter's own."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: Source
    added: StoredTensor
    scale: float

    @property
    def decoder(self) -> Decoder:
        """Sums."""
        return AddedVector(self.below.decoder, DTYPES[self.added.dtype].torch_name, self.scale)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Both."""
        return (*self.below.origins, self.added)

    @property
    def identity(self) -> Identity:
        """Identities of both, and the scale."""
        return ["shifted", self.scale.hex(), self.below.identity, self.added.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the bytes of both."""
        return (*self.below.ranges(start, stop), *self.added.ranges(start, stop))

    def max_nbytes(self, num_elements: int) -> int:
        """Return the most room that so many elements of both take."""
        return self.below.max_nbytes(num_elements) + self.added.max_nbytes(num_elements)


def make_factor(stored: StoredTensor, strides: tuple[int, int, int], *, is_whole: bool = True) -> Factor:
    """Return how a factor lies in its file; see `Factor`."""
    return Factor(DTYPES[stored.dtype].torch_name, strides, is_whole)
