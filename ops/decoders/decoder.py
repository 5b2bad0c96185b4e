"""The seam between stored bytes and the values that kernels see."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

from raymerge.ops.lazy import low_rank_loops, np, torch
from raymerge.ops.stored import LOOP_DTYPES, item_nbytes

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Raw:
    """The stored bytes behind some elements of one source, where they are merged."""

    pieces: Sequence[torch.Tensor]
    """Flat uint8 tensors, one for each byte range that the source asked for, in its order."""
    start: int
    """First element of the source that the pieces were fetched for."""
    stop: int
    """Element after the last: the pieces are enough to decode [start, stop)."""
    memo: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)
    """Results that a decoder keeps from one block of these pieces to the next."""


class Decoder(ABC):
    """Turns the stored bytes of a source into values; frozen, hashable and picklable.

    The engine calls `start` for each tensor, and of what that returns, for each of `num_passes`, `measure` for all
    elements and `end_pass`. After that it calls `decode` any number of times for each `Raw`, block by block, in in
    order from the first to the last, and the latest again if need be, on the device that holds the pieces. The same
    elements give the same values wherever they are cut.
    """

    @property
    def has_loops(self) -> bool:
        """Return whether `decode_stored` is there, so that compiled loops can merge what it decodes."""
        return False

    @property
    def num_passes(self) -> int:
        """Passes over all bytes before any value can be decoded; 0 for most decoders."""
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

    def decode_stored(
        self, pieces: Sequence[memoryview], span: tuple[int, int], start: int, stop: int, out: NDArray[np.float32]
    ) -> None:
        """Write the values of elements [start, stop) to `out` without torch, with the bits of `decode` in float32.

        Args:
            pieces: the bytes of each range, as in `Raw`.
            span: the elements that they were fetched for, as in `Raw`.
            start: index of the first element in the flattened source.
            stop: index after the last element.
            out: flat, of `stop - start` elements.
        """
        raise AssertionError("this decoder has no loops")

    def compile_loops(self) -> None:  # noqa: B027  # nothing is to be done for most decoders
        """Compile and try what `decode_stored` calls; raises whatever keeps it from working here."""


@dataclass(frozen=True, slots=True)
class Plain(Decoder):
    """Values stored one after the other, in a dtype that torch knows."""

    dtype: str
    """Torch's word for it, such as `bfloat16`."""

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Convert the values; exact from every dtype that is no wider than `out`."""
        dtype = find_dtype(self.dtype)
        return out.copy_(raw.pieces[0].view(dtype)[start - raw.start : stop - raw.start])

    @property
    def has_loops(self) -> bool:
        """Return whether loops know the dtype."""
        return self.dtype in LOOP_DTYPES

    def decode_stored(
        self, pieces: Sequence[memoryview], span: tuple[int, int], start: int, stop: int, out: NDArray[np.float32]
    ) -> None:
        """Convert the values."""
        words, longs, form = self.find_stored(pieces[0], start - span[0], stop - span[0])
        low_rank_loops.convert(words, longs, form, stop - start, out)

    def find_stored(
        self, piece: memoryview, start: int, stop: int
    ) -> tuple[NDArray[np.uint16], NDArray[np.uint32], int]:
        """Return elements [start, stop) of some bytes as loops take them: words of 16 bits, of 32 bits, and form."""
        item = item_nbytes(self.dtype)
        stored = piece[start * item : stop * item]
        words = np.frombuffer(stored if item == 2 else b"", np.uint16)
        return words, np.frombuffer(stored if item == 4 else b"", np.uint32), LOOP_DTYPES.index(self.dtype)


@cache
def find_dtype(name: str) -> torch.dtype:
    """Return the dtype that torch calls by this name."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype
