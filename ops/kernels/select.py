"""Exact selection of the largest elements by the bits of their floats."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raymerge.ops.kernels.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, loops, np, torch
from raymerge.ops.stored import RunAll, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HALF = 16
_NUM_LOW = 2**16
_NUM_HIGH = 2**15
"""Without the sign, 15 high bits are left."""

_MAX_TABLES = 32
"""Tables of counts on a GPU."""

_PART = 256
"""Bins that are added up together before one is looked for among them."""

_NUM_KEPT_TABLES = 4
_TABLES: list[NDArray[Any]] = []
"""Tables to count the next tensors in: fresh pages cost as much as counting a small one does."""

SELECTION_NBYTES = _NUM_LOW * 8 + 3 * _NUM_LOW * 4
"""Memory of a selection: a table of counts, and low bits waiting to be counted."""
SELECTION_TEMPORARY_NBYTES = 6 * _NUM_LOW * 8
"""Besides, while a block is counted: a second table, indices, and copies."""


class MagnitudeSparsifier(Sparsifier):
    """Keeps the k elements with the largest absolute values; of equal ones at the threshold those of lowest index.

    The bits of non-negative floats order as their values do. The first pass counts by the 15 high bits, which gives the
    threshold's bin; the second counts that bin by the 16 low bits, which gives the threshold itself.
    """

    num_passes = 2

    def __init__(self, num_kept: int) -> None:
        """Select the largest `num_kept` elements of a tensor; at least 1, at most all."""
        self._num_kept = num_kept
        self._counts: torch.Tensor | NDArray[Any] | None = None
        self._pending: list[torch.Tensor] = []
        self._num_pending = 0
        self._bin = 0
        self._num_above = 0
        self._threshold = 0.0
        self._below_threshold = 0.0
        self._quota = 0
        self._has_ties = False
        self._left = 0

    @property
    def threshold(self) -> float:
        """The smallest absolute value that is kept; known after both passes."""
        return self._threshold

    def figures(self) -> Mapping[str, float]:
        """Return the threshold, and how many elements are kept that are not zero."""
        return {"threshold": self._threshold, "kept": self._num_kept if self._threshold else self._num_above}

    def measure(self, index: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count one block, by high bits or by low ones."""
        if delta.dtype != torch.float32:
            raise TypeError(f"selection by magnitude works on float32, not on {delta.dtype}")
        bits = delta.abs_().view(torch.int32)
        if index == 0:
            self._count(bits.bitwise_right_shift_(_HALF), _NUM_HIGH)
            return
        self._pending.append(_low_bits_in_bin(bits, self._bin, spares[0]))
        self._num_pending += self._pending[-1].numel()
        if self._num_pending >= _NUM_LOW:
            self._count_pending()

    def measure_stored(self, index: int, stored: Stored, source: int) -> None:
        """Count what is there at once, by high bits or by low ones."""
        if self._counts is None:
            self._counts = _take_table().reshape((2, _NUM_HIGH) if index == 0 else (1, _NUM_LOW))
        if index == 0:
            delta_loops.count_high(*stored.sources(), source, stored.num_elements, self._counts, loops.make_scratch(2))
        else:
            scratch = loops.make_scratch(3)
            delta_loops.count_low(*stored.sources(), source, stored.num_elements, self._bin, self._counts[0], scratch)

    def end_pass(self, index: int) -> None:
        """Find the bin that holds the threshold."""
        if index == 1:
            self._count_pending()
        if self._counts is None:  # an empty tensor
            return
        if isinstance(self._counts, np.ndarray):
            counts = self._counts.sum(0)
            if len(_TABLES) < _NUM_KEPT_TABLES:
                _TABLES.append(self._counts)
        else:
            counts = self._counts.cpu().numpy()
        chosen, num_above, num_equal = _find_bin(counts, self._num_kept - self._num_above)
        self._counts = None
        self._num_above += num_above
        if index == 0:
            self._bin = chosen
            return
        bits = self._bin << _HALF | chosen
        self._threshold = _float_of_bits(bits)
        self._below_threshold = _float_of_bits(max(0, bits - 1))
        self._quota = self._num_kept - self._num_above
        self._has_ties = num_equal > self._quota

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what lies below the threshold to zero, and what lies on it once as many are kept as may be."""
        if self._threshold == 0:
            return
        if start == 0:
            self._left = self._quota
        largest_dropped = self._below_threshold
        if self._has_ties:
            if self._left == 0:
                largest_dropped = self._threshold
            else:
                self._drop_ties(delta, spares[0])
        torch.ops.aten.hardshrink.out(delta, largest_dropped, out=delta)

    def make_trim(self, stored: Stored) -> Trim:
        """Return the threshold, and how many elements on it may still be kept."""
        if self._threshold == 0 or math.isnan(self._threshold):
            return Trim()
        if stored.start == 0:
            self._left = self._quota
        left = self._left if self._has_ties else -1
        threshold = _bits_of_float(self._threshold)
        return Trim(delta_loops.MAGNITUDE, (threshold - 1, threshold), left=left)

    def fork(self, pieces: Sequence[Stored], source: int, run_all: RunAll) -> Sequence[Sparsifier]:
        """Return one for each piece, which knows how many elements on the threshold may be kept there."""
        if pieces[0].start == 0:
            self._left = self._quota
        if not self._has_ties or self._left == 0 or self._threshold == 0 or math.isnan(self._threshold):
            return [self] * len(pieces)
        threshold = _bits_of_float(self._threshold)
        forks = []
        for num_equal in run_all([partial(_count_equal, piece, source, threshold) for piece in pieces]):
            forks.append(copy.copy(self))
            self._left -= min(self._left, num_equal)
        return forks

    def end_trim(self, left: int) -> None:
        """Remember how many elements on the threshold may be kept of those that come next."""
        self._left = left

    def _count(self, values: torch.Tensor, num_values: int) -> None:
        counts = (
            values.bincount(minlength=num_values) if values.device.type == "cpu" else _count_apart(values, num_values)
        )
        self._counts = counts if self._counts is None else self._counts + counts

    def _count_pending(self) -> None:
        """Count what several blocks had in the bin: rarely, for the table is as large as a block."""
        if self._pending:
            self._count(torch.cat(self._pending), _NUM_LOW)
        self._pending = []
        self._num_pending = 0

    def _drop_ties(self, delta: torch.Tensor, spare: torch.Tensor) -> None:
        """Set elements at the threshold to zero once as many were kept as may be."""
        is_equal = torch.eq(torch.abs(delta, out=spare), self._threshold, out=spare)
        num_equal = int(is_equal.count_nonzero().item())
        if num_equal > self._left:
            delta[is_equal.nonzero()[self._left :, 0]] = 0
        self._left -= min(self._left, num_equal)


def _low_bits_in_bin(bits: torch.Tensor, high_bits: int, spare: torch.Tensor) -> torch.Tensor:
    """Return the low bits of the numbers with these high bits, in a tensor of their own; overwrites its arguments."""
    bits.sub_(high_bits << _HALF)
    if bits.device.type != "cpu":
        return bits[(bits >= 0) & (bits < _NUM_LOW)]
    unsigned = bits.numpy().view(np.uint32)
    is_inside = spare.view(torch.uint8)[: bits.numel()].numpy().view(np.bool_)
    np.less(unsigned, np.uint32(_NUM_LOW), out=is_inside)
    return torch.from_numpy(bits.numpy()[np.flatnonzero(is_inside)])


def _count_equal(stored: Stored, source: int, threshold: int) -> int:
    """Return how many elements of a delta have the magnitude with these bits."""
    counted = delta_loops.count_equal(*stored.sources(), source, stored.num_elements, threshold, loops.make_scratch(2))
    return int(counted)


def _count_apart(values: torch.Tensor, num_values: int) -> torch.Tensor:
    """Return how often each number occurs in `values`, on a GPU; overwrites them.

    Neighbours count in tables of their own: additions to one place wait for each other, and most deltas between models
    that are stored in few bits are one of a few numbers.
    """
    num_tables = max(1, min(_MAX_TABLES, len(values) // num_values))
    rows = values[: len(values) // num_tables * num_tables].view(-1, num_tables)
    rows.add_(torch.arange(num_tables, dtype=torch.int32, device=values.device).mul_(num_values))
    counts = torch.zeros(num_tables * num_values, dtype=torch.int32, device=values.device)
    ones = torch.full((), 1, dtype=torch.int32, device=values.device).expand(len(values))
    return counts.index_add_(0, values, ones).view(num_tables, num_values).sum(0)


def _find_bin(counts: NDArray[Any], rank: int) -> tuple[int, int, int]:
    """Return the bin that holds the element of this rank (1 is the largest), the number above it, and in it."""
    parts = counts.reshape(-1, _PART)
    part, num_above = _find_place(parts.sum(1), rank)
    place, num_also_above = _find_place(parts[part], rank - num_above)
    chosen = part * _PART + place
    return chosen, num_above + num_also_above, int(counts[chosen])


def _find_place(counts: NDArray[Any], rank: int) -> tuple[int, int]:
    """Return where the element of this rank is counted, and the number above it."""
    from_top = np.cumsum(counts[::-1])
    place = int(np.searchsorted(from_top, rank))
    index = len(counts) - 1 - place
    return index, int(from_top[place] - counts[index])


def _take_table() -> NDArray[Any]:
    """Return zeros to count in."""
    try:
        table = _TABLES.pop()
    except IndexError:
        return np.zeros(_NUM_LOW, np.int64)
    table.fill(0)
    return table


def _float_of_bits(bits: int) -> float:
    """Return the float32 that has these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _bits_of_float(value: float) -> int:
    """Return the bits of a float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits
