"""The seam between stored bytes and the values that kernels see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from raymerge.ops.lazy import torch


@dataclass(frozen=True, slots=True)
class Raw:
    """The stored bytes behind some elements of one source, where they are merged."""

    pieces: Sequence[torch.Tensor]
    """Flat uint8 tensors, one for each byte range that the source asked for, in its order."""
    start: int
    """First element of the source that the pieces were fetched for."""
    stop: int
    """Element after the last: the pieces are enough to decode [start, stop)."""


class Decoder(ABC):
    """Turns the stored bytes of a source into values; frozen, hashable and picklable.

    The engine calls `start` for each tensor, and of what that returns, for each of `num_passes`, `measure` for all
    elements and `end_pass`. After that it calls `decode` any number of times for each `Raw`, block by block, in in
    order from the first to the last, and the latest again if need be, on the device that holds the pieces. The same
    elements give the same values wherever they are cut.
    """

    @property
    def num_passes(self) -> int:
        """How often all bytes are measured before any value can be decoded: most are decoded at once."""
        return 0

    def state_nbytes(self, num_elements: int) -> int:
        """Return the memory that a started decoder keeps where so many elements are decoded at once, in bytes."""
        return 0

    def start(self) -> Decoder:
        """Return a decoder for one tensor on one worker, which may keep something from block to block."""
        return self

    def measure(self, index: int, raw: Raw, start: int, stop: int) -> None:
        """Take the figures of measuring pass `index` from elements [start, stop); in order, all elements once."""
        raise AssertionError("this decoder measures nothing")

    def end_pass(self, index: int) -> None:
        """Evaluate measuring pass `index`, after its last elements."""
        raise AssertionError("this decoder measures nothing")

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the memory that decoding so many elements at once takes besides the output, in bytes."""
        return 0

    @abstractmethod
    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Write the values of elements [start, stop) to `out` and return it.

        Args:
            raw: the bytes of [raw.start, raw.stop), which holds [start, stop).
            start: index of the first element in the flattened source.
            stop: index after the last element.
            out: flat, of `stop - start` elements, in the kernel's compute dtype.
        """


@dataclass(frozen=True, slots=True)
class Plain(Decoder):
    """Values stored one after the other, in a dtype that torch knows."""

    dtype: str
    """Torch's word for it, such as `bfloat16`."""

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Convert the values; exact from every dtype that is no wider than `out`."""
        dtype = find_dtype(self.dtype)
        return out.copy_(raw.pieces[0].view(dtype)[start - raw.start : stop - raw.start])


@cache
def find_dtype(name: str) -> torch.dtype:
    """Return the dtype that torch calls by this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
