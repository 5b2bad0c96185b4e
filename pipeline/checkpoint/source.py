"""Input tensors: which bytes their values come from, and how these are decoded."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

from raymerge.ops.decoders.decoder import Decoder, Plain
from raymerge.ops.decoders.noise import Noise
from raymerge.ops.decoders.update_factors import Scaled, Zeros
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.stores.files import ByteRange, StoredFile, aligned

Identity = str | int | list["Identity"]
"""JSON that is equal for two sources only if their values are."""


_PLAIN = {name: Plain(dtype.torch_name) for name, dtype in DTYPES.items()}
"""Decoders of values as they are, by dtype."""


class Source(ABC):
    """One input tensor, as a view of its model shows it; frozen and picklable.

    Planning asks for sizes, dtype and identity; a worker fetches `ranges` and hands what arrives to `decoder`.
    """

    __slots__ = ()

    model: str
    """The model reference, for messages."""
    name: str
    """The tensor's name in the checkpoint, for messages."""
    dtype: str
    """Dtype of the decoded values, as in a safetensors header: the output's dtype follows from it."""
    shape: tuple[int, ...]

    @property
    @abstractmethod
    def decoder(self) -> Decoder:
        """Decoder that turns the bytes into values."""

    @property
    @abstractmethod
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensors that it reads: all of them count as used."""

    @property
    @abstractmethod
    def identity(self) -> Identity:
        """Everything that decides its values, for the fingerprint of a plan."""

    @abstractmethod
    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the bytes that elements [start, stop) are decoded from, in the order in which they are decoded."""

    def find_early(self, index: int, start: int, stop: int) -> tuple[bool, ...]:
        """Tell which of the ranges of elements [start, stop) its decoder measures in a pass, before it decodes.

        The default is all of them, or none after the decoder's last pass.
        """
        return (index < self.decoder.num_passes,) * len(self.ranges(start, stop))

    @abstractmethod
    def max_nbytes(self, num_elements: int) -> int:
        """Return the most room that the ranges of so many neighbouring elements take in a buffer, in bytes.

        Ranges start at multiples of `stores.files.ALIGNMENT`. Twice the elements take at most twice the room.
        """

    @property
    def fixed_nbytes(self) -> int:
        """Part of `max_nbytes` that is taken however few elements there are, in bytes."""
        return 0

    def decoded_nbytes(self, num_elements: int) -> int:
        """Return the room for float32 values, for loops that cannot take them as they are stored."""
        decoder = self.decoder
        return 0 if isinstance(decoder, Plain) or not decoder.has_loops else aligned(4 * num_elements)

    def room_nbytes(self, num_elements: int) -> int:
        """Return the most room that so many elements take in a buffer, stored and decoded, in bytes."""
        return self.max_nbytes(num_elements) + self.decoded_nbytes(num_elements)

    @property
    def num_elements(self) -> int:
        """Elements of the whole tensor."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that are read if all of it is read once."""
        return sum(piece.nbytes for piece in self.ranges(0, self.num_elements))


@dataclass(frozen=True, slots=True)
class StoredTensor(Source):
    """One tensor as it lies in a file."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    file: StoredFile
    start: int
    """Offset of the first byte in the file."""
    stop: int
    """Offset after the last byte: the tensor is [start, stop) of the file."""

    @property
    def nbytes(self) -> int:
        """Stored bytes."""
        return self.stop - self.start

    @property
    def decoder(self) -> Decoder:
        """Plain values."""
        return _PLAIN[self.dtype]

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """Itself."""
        return (self,)

    @property
    def identity(self) -> Identity:
        """Its place in its file, and the file's content."""
        file = self.file
        name = file.url.rpartition("/")[2]
        return [self.name, self.dtype, self.start, self.stop, name, file.nbytes, file.content_id]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return one range."""
        num_bits = DTYPES[self.dtype].num_bits
        return (ByteRange(self.file, self.start + start * num_bits // 8, self.start + stop * num_bits // 8),)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the size of the elements as stored."""
        return aligned(num_elements * DTYPES[self.dtype].num_bits // 8)

    def as_bytes(self) -> StoredTensor:
        """Return the same bytes as a flat tensor of uint8, to be copied and never converted."""
        return replace(self, dtype="U8", shape=(self.nbytes,))

    def __repr__(self) -> str:
        return f"StoredTensor({self.name} of {self.model}, {self.dtype} {list(self.shape)})"


@dataclass(frozen=True, slots=True)
class PlannedTensor(StoredTensor):
    """Values that planning has worked out: they are read from an `InlineFile`, and come from no model's file."""

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """None."""
        return ()


@dataclass(frozen=True, slots=True)
class RandomTensor(Source):
    """Normally distributed random numbers, of which nothing is stored."""

    model: str
    name: str
    """The output tensor that they are for: no two have the same numbers."""
    dtype: str
    shape: tuple[int, ...]
    seed: int

    @property
    def decoder(self) -> Decoder:
        """Draws them."""
        return Noise(self.seed, self.name)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """None."""
        return ()

    @property
    def identity(self) -> Identity:
        """The seed and the name."""
        return ["noise", self.seed, self.name]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return none."""
        return ()

    def max_nbytes(self, num_elements: int) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, slots=True)
class ZeroTensor(Source):
    """Zeros, of which nothing is stored."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def decoder(self) -> Decoder:
        """Writes zeros."""
        return Zeros()

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """None."""
        return ()

    @property
    def identity(self) -> Identity:
        """Nothing but that."""
        return ["zeros"]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return none."""
        return ()

    def max_nbytes(self, num_elements: int) -> int:
        """Return 0."""
        return 0


@dataclass(frozen=True, slots=True)
class ScaledTensor(Source):
    """Stored values times a number."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    stored: StoredTensor
    scale: float

    @property
    def decoder(self) -> Decoder:
        """Scales plain values."""
        return Scaled(self.stored.decoder, self.scale)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensor."""
        return (self.stored,)

    @property
    def identity(self) -> Identity:
        """Identity of the stored tensor, and the number."""
        return ["scaled", self.scale.hex(), self.stored.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return the stored bytes."""
        return self.stored.ranges(start, stop)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the size of the elements as stored."""
        return self.stored.max_nbytes(num_elements)
