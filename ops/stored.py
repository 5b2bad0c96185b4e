"""Stored values where they lie, for loops that decode, merge and round in one go."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from raymerge.ops.lazy import np

if TYPE_CHECKING:
    from numpy.typing import NDArray

LOOP_DTYPES = ("bfloat16", "float16", "float32")
"""Stored values that compiled loops work on, by torch's word for the dtype; loops know them by their index."""

STRIP = 1024
"""Elements that a loop works off together."""

PIECE_ELEMENTS = 2**19
"""Elements that a thread works off by itself: some blocks, which take about a millisecond. Pieces are the same however
many threads there are, for what is added up over each of them is then added up in one order."""

RunAll = Callable[[Sequence[Callable[[], Any]]], list[Any]]
"""Calls functions that do not disturb each other, on several threads where there are some, and returns their results.

It returns, or raises what the first of them raised, when all have ended.
"""

_ITEM_NBYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "uint8": 1}


@dataclass(frozen=True, slots=True)
class Stored:
    """Elements [start, stop) of every source of a tensor, as they are stored, in one buffer."""

    start: int
    stop: int
    buffer: memoryview
    """Its size is a multiple of four bytes."""
    offsets: tuple[int, ...]
    """First byte of each source in it; multiples of the size of its values."""
    dtypes: tuple[str, ...]
    """Dtype of each source, by torch's word for it."""

    @property
    def num_elements(self) -> int:
        """Elements of each source."""
        return self.stop - self.start

    def split(self, num_elements: int) -> list[Stored]:
        """Return the pieces between multiples of so many elements of the tensor.

        >>> [(piece.start, piece.stop) for piece in Stored(3, 9, memoryview(b""), (), ()).split(4)]
        [(3, 4), (4, 8), (8, 9)]
        """
        inner = range(self.start // num_elements * num_elements + num_elements, self.stop, num_elements)
        return [self.cut(start, stop) for start, stop in pairwise([self.start, *inner, self.stop])]

    def cut(self, start: int, stop: int) -> Stored:
        """Return elements [start, stop) alone."""
        if (start, stop) == (self.start, self.stop):
            return self
        skipped = start - self.start
        offsets = tuple(
            offset + skipped * _ITEM_NBYTES[dtype] for offset, dtype in zip(self.offsets, self.dtypes, strict=True)
        )
        return Stored(start, stop, self.buffer, offsets, self.dtypes)

    def view(self, source: int) -> memoryview:
        """Return the bytes of one source."""
        offset, nbytes = self.offsets[source], self.num_elements * _ITEM_NBYTES[self.dtypes[source]]
        return self.buffer[offset : offset + nbytes]

    def sources(self) -> tuple[NDArray[Any], ...]:
        """Return the arguments by which loops find the sources: words, longs, places, forms."""
        places = [offset // _ITEM_NBYTES[dtype] for offset, dtype in zip(self.offsets, self.dtypes, strict=True)]
        forms = [LOOP_DTYPES.index(dtype) for dtype in self.dtypes]
        return (
            np.frombuffer(self.buffer, np.uint16),
            np.frombuffer(self.buffer, np.uint32),
            np.array(places, np.int64),
            np.array(forms, np.int64),
        )


@dataclass(frozen=True, slots=True)
class Slot:
    """Room for rounded results."""

    buffer: memoryview
    """As large as they are; begins at a multiple of the size of a value."""
    dtype: str
    """Dtype of the rounded values, by torch's word for it."""
    squares: NDArray[Any]
    """`STRIP` sums of squares, in float32, to which those of the results are added; see `KernelRun.combine_stored`."""

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments by which loops find it: words, longs, form, squares."""
        is_wide = self.dtype == "float32"
        unused = bytearray()
        words = np.frombuffer(unused if is_wide else self.buffer, np.uint16)
        longs = np.frombuffer(self.buffer if is_wide else unused, np.uint32)
        return words, longs, LOOP_DTYPES.index(self.dtype), self.squares

    def read(self) -> NDArray[Any]:
        """Return the results, as float32."""
        if self.dtype == "bfloat16":
            return widen(np.frombuffer(self.buffer, np.uint16))
        return np.frombuffer(self.buffer, self.dtype).astype(np.float32)


def find_slots(slots: Sequence[Slot]) -> tuple[Any, ...]:
    """Return the arguments by which loops find slots of one dtype: words, longs, places, form."""
    if len(slots) == 1:
        words, longs, form, _ = slots[0].arguments()
        return words, longs, np.zeros(1, np.int64), form
    dtype, unused = slots[0].dtype, bytearray()
    is_wide, item = dtype == "float32", item_nbytes(dtype)
    addresses = [np.frombuffer(slot.buffer, np.uint8).ctypes.data for slot in slots]
    start = min(addresses)
    stop = max(address + len(slot.buffer) for address, slot in zip(addresses, slots, strict=True))
    span = np.asarray(_Span(slots, start, (stop - start) // item, "u4" if is_wide else "u2"))
    words = np.frombuffer(unused, np.uint16) if is_wide else span
    longs = span if is_wide else np.frombuffer(unused, np.uint32)
    return words, longs, (np.array(addresses, np.int64) - start) // item, LOOP_DTYPES.index(dtype)


def find_memory(pieces: Sequence[memoryview]) -> tuple[tuple[Any, ...], list[int]]:
    """Return the arguments by which loops find bytes of any place: words of 16 and of 32 bits, and float64.

    Args:
        pieces: the bytes; those that do not begin where such words may are copied.

    Returns:
        The arguments, and where each piece begins, in bytes.
    """
    arrays = [np.frombuffer(piece, np.uint8) for piece in pieces]
    arrays = [array if array.ctypes.data % 8 == 0 else array.copy() for array in arrays]
    addresses = [array.ctypes.data for array in arrays]
    start = min(addresses)
    nbytes = max(address + array.nbytes for address, array in zip(addresses, arrays, strict=True)) - start
    views = tuple(
        np.asarray(_Span(arrays, start, nbytes // item, kind)) for item, kind in ((2, "u2"), (4, "u4"), (8, "f8"))
    )
    return views, [address - start for address in addresses]


class _Span:
    """Memory from the first of some objects to the last, as numpy sees it; what is between them is never touched."""

    def __init__(self, owners: Sequence[Any], address: int, num_items: int, kind: str) -> None:
        self._owners = owners  # live as long as the array does
        data = address, False
        self.__array_interface__ = {"data": data, "shape": (num_items,), "typestr": f"={kind}", "version": 3}


def item_nbytes(dtype: str) -> int:
    """Return the size of a value of one of `LOOP_DTYPES`, or of a byte, uint8."""
    return _ITEM_NBYTES[dtype]


def widen(halves: NDArray[np.uint16]) -> NDArray[np.float32]:
    """Return bfloat16 values, given by their bits, as float32.

    >>> widen(np.array([0x3F80, 0xC000], np.uint16)).tolist()
    [1.0, -2.0]
    """
    return (halves.astype(np.uint32) << np.uint32(16)).view(np.float32)
