"""Exact selection of the largest elements by the bits of their floats."""

from __future__ import annotations

import copy
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raymerge.ops.kernels.sparsifiers.counts import (
    NUM_HIGH,
    NUM_LOW,
    HighCounts,
    LowCounts,
    find_bin,
    read_table,
    take_table,
)
from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, np, sum_loops, torch
from raymerge.ops.stored import RunAll, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

_HALF = 16
_MAX_TABLES = 32
"""Tables of counts on a GPU."""

_INFINITY = 0x7F800000
"""Bits of the largest float."""

CUT_NBYTES = NUM_LOW * 8 + 3 * NUM_LOW * 4
"""Memory of a threshold that is looked for: a table of counts, and low bits waiting to be counted."""
SELECTION_TEMPORARY_NBYTES = 6 * NUM_LOW * 8
"""Besides, while a block is counted: a second table, indices, and copies."""


class MagnitudeSparsifier(Sparsifier):
    """Keeps the k elements with the largest absolute values, the very largest left out or not.

    Of equal ones at a threshold those of lowest index are kept.

    The bits of non-negative floats order as their values do. The first pass counts by the 15 high bits, which gives the
    threshold's bin; the second counts that bin by the 16 low bits, which gives the threshold itself.
    """

    num_passes = 2

    def __init__(self, num_kept: int, num_outliers: int = 0) -> None:
        """Select elements of a tensor by their size.

        Args:
            num_kept: how many are kept; at least 1, with `num_outliers` at most all.
            num_outliers: how many that are larger than these are dropped.
        """
        self._num_kept = num_kept
        self._num_outliers = num_outliers
        self._lower = _Cut(num_kept + num_outliers)
        self._upper = _Cut(num_outliers + 1) if num_outliers else None
        self._high = HighCounts()
        self._low: LowCounts | None = None
        """Counts of low bits that other sparsifiers of the delta use, too."""
        self._quotas = self._left = (-1, -1)
        """Numbers of elements on the lower and the upper threshold that may be kept; -1 where all may."""

    def choose(self, num_kept: int) -> None:
        """Keep another number of elements, which may become known in the first pass."""
        self._num_kept = num_kept
        self._lower.rank = num_kept + self._num_outliers

    def figures(self) -> Mapping[str, float]:
        """Return the threshold, and how many elements are kept that are not zero."""
        kept = self._num_kept if self._lower.value else max(0, self._lower.num_above - self._num_outliers)
        upper = {"upper_threshold": self._upper.value} if self._upper else {}
        return {"threshold": self._lower.value, "kept": kept, **upper}

    def measure(self, index: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Count one block, by high bits or by low ones."""
        if delta.dtype != torch.float32:
            raise TypeError(f"selection by magnitude works on float32, not on {delta.dtype}")
        bits = delta.abs_().view(torch.int32)
        if index == 0:
            counts = _count(bits.bitwise_right_shift_(_HALF), NUM_HIGH)
            self._high.table = counts if self._high.table is None else self._high.table + counts
            return
        offset = 0
        for cut in self._list_bins():
            cut.collect(bits.sub_((cut.bin << _HALF) - offset), spares[0])
            offset = cut.bin << _HALF

    def measure_stored(self, index: int, stored: Stored, source: int) -> None:
        """Count what is there at once, by high bits or by low ones."""
        if index == 0:
            if self._high.table is None:
                self._high.table = take_table(1).reshape(2, NUM_HIGH)
            table, scratch = self._high.table, sum_loops.make_scratch(2)
            delta_loops.count_high(*stored.sources(), source, stored.num_elements, table, scratch)
            return
        cuts = self._list_bins()
        for cut in cuts:
            if cut.counts is None:
                cut.counts = take_table(1)
        bins = cuts[0].bin, cuts[-1].bin, cuts[0].counts, cuts[-1].counts
        delta_loops.count_low(*stored.sources(), source, stored.num_elements, *bins, sum_loops.make_scratch(3))

    def share_counts(self, other: MagnitudeSparsifier) -> None:
        """Take what another one counts of the same elements in the first pass, before it ends."""
        self._high = other._high

    def share_low_counts(self, others: Sequence[MagnitudeSparsifier], stored: Stored, source: int) -> None:
        """Count by low bits what is there at once, for this one and others that have shared its counts."""
        low = self._low
        if low is None:
            sparsifiers = [self, *others]
            low = LowCounts([cut.bin for each in sparsifiers for cut in each._list_cuts()], len(sparsifiers))
            for each in sparsifiers:
                each._low = low
        low.count(stored, source)

    def end_pass(self, index: int) -> None:
        """Find the bins that hold the thresholds, or the thresholds."""
        if index == 0:
            counts = self._high.read()
            if counts is not None:
                for cut in self._list_cuts():
                    cut.find_bin(counts)
            self._high = HighCounts()
            return
        low = self._low
        found = {cut.bin: low.read(cut.bin) if low else cut.read_counts() for cut in self._list_bins()}
        for cut in self._list_cuts():
            cut.find_value(found[cut.bin])
        if low:
            low.leave()
            self._low = None
        lower, upper = self._lower, self._upper
        if math.isnan(lower.value):  # NaN are the largest, and always kept: so is all
            return
        quotas = [lower.rank - lower.num_above, -1]
        if upper and not math.isnan(upper.value):
            if upper.value == lower.value:
                quotas[0] = self._num_kept
            elif upper.num_above < self._num_outliers:
                quotas[1] = upper.num_equal - (self._num_outliers - upper.num_above)
        if not lower.value or quotas[0] == lower.num_equal:
            quotas[0] = -1
        self._quotas = quotas[0], quotas[1]

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what lies outside of the thresholds to zero, and what lies on one once as many are kept as may be."""
        if start == 0:
            self._left = self._quotas
        limits, left = self._list_limits(), self._left
        if limits is None:
            return
        values = [_float_of_bits(bits) for bits in limits]
        self._left = tuple(  # type: ignore[assignment]  # two
            _drop_ties(delta, values[which], num_left, spares[0]) if num_left > 0 else num_left
            for which, num_left in zip((1, 2), left, strict=True)
        )
        torch.ops.aten.hardshrink.out(delta, values[1 if left[0] == 0 else 0], out=delta)
        if self._num_outliers:
            is_above = spares[1].view(torch.bool)[: delta.numel()]
            largest_kept = values[3 if left[1] == 0 else 2]
            delta.masked_fill_(torch.gt(torch.abs(delta, out=spares[0]), largest_kept, out=is_above), 0)

    def make_trim(self, stored: Stored) -> Trim:
        """Return the thresholds, and how many elements on them may still be kept."""
        if stored.start == 0:
            self._left = self._quotas
        limits = self._list_limits()
        return Trim() if limits is None else Trim(delta_loops.MAGNITUDE, limits, left=self._left)

    def fork(self, pieces: Sequence[Stored], source: int, run_all: RunAll) -> Sequence[Sparsifier]:
        """Return one for each piece, which knows how many elements on the thresholds may be kept there."""
        return self.fork_by(pieces, run_all, lambda piece, *thresholds: count_equal(piece, source, *thresholds))

    def fork_by(
        self, pieces: Sequence[Stored], run_all: RunAll, count: Callable[..., list[int]]
    ) -> Sequence[MagnitudeSparsifier]:
        """Do so for other values than a delta.

        Args:
            pieces: in order, neighbours.
            run_all: counts in several pieces at once.
            count: called as `count(piece, *bits)`, for how many elements of a piece have the sizes with these bits.
        """
        if pieces[0].start == 0:
            self._left = self._quotas
        limits = self._list_limits()
        if limits is None or max(self._left) <= 0:
            return [self] * len(pieces)
        forks = []
        found = run_all([partial(count, piece, limits[1], limits[2]) for piece in pieces])
        for counts in found:
            forks.append(copy.copy(self))
            left = [num_left - min(max(num_left, 0), count) for num_left, count in zip(self._left, counts, strict=True)]
            self._left = left[0], left[1]
        return forks

    def end_trim(self, left: tuple[int, int]) -> None:
        """Remember how many elements on the thresholds may be kept of those that come next."""
        self._left = left

    def _list_cuts(self) -> list[_Cut]:
        return [self._lower, self._upper] if self._upper else [self._lower]

    def _list_bins(self) -> list[_Cut]:
        """Return a cut for each bin that holds thresholds."""
        return list({cut.bin: cut for cut in self._list_cuts()}.values())

    def _list_limits(self) -> tuple[int, int, int, int] | None:
        """Return the limits of `Trim`; None where all is kept."""
        lower = self._lower.value
        upper = self._upper.value if self._upper else math.nan
        if math.isnan(lower) or (lower == 0 and not self._upper):
            return None
        low = _bits_of_float(lower)
        high = _INFINITY if math.isnan(upper) else _bits_of_float(upper)
        return max(0, low - 1), low, high, max(0, high - 1)


def measure_together(index: int, sparsifiers: Sequence[MagnitudeSparsifier], stored: Stored, source: int) -> None:
    """Do as `measure_stored` of each of some sparsifiers of one delta, which is looked at once for all of them."""
    first, *others = sparsifiers
    if others and index:
        first.share_low_counts(others, stored, source)
        return
    first.measure_stored(index, stored, source)
    for other in others:
        other.share_counts(first)


class _Cut:
    """One threshold while it is looked for."""

    def __init__(self, rank: int) -> None:
        """Look for the element of this rank; 1 is the largest."""
        self.rank = rank
        self.bin = self.num_above = self.num_equal = 0
        self.value = 0.0
        self.counts: torch.Tensor | NDArray[Any] | None = None
        self._pending: torch.Tensor | None = None
        """Room for low bits: many small tensors that wait would keep the large ones between them from being freed."""
        self._num_pending = 0

    def collect(self, offsets: torch.Tensor, spare: torch.Tensor) -> None:
        """Take the low bits of a block, which come with the bin's bits subtracted."""
        found = _low_bits(offsets, spare)
        if self._num_pending + len(found) > NUM_LOW:
            self._count_pending()
        if len(found) > NUM_LOW:
            self._count(found)
            return
        if self._pending is None:
            self._pending = torch.empty(NUM_LOW, dtype=found.dtype, device=found.device)
        self._pending[self._num_pending : self._num_pending + len(found)] = found
        self._num_pending += len(found)

    def read_counts(self) -> NDArray[Any]:
        """Return how often each of the low bits occurs in the bin."""
        self._count_pending()
        self._pending = None
        counts, self.counts = self.counts, None
        return np.zeros(NUM_LOW, np.int64) if counts is None else read_table(counts)

    def find_bin(self, counts: NDArray[Any]) -> None:
        """Find the bin among high bits."""
        self.bin, self.num_above, _ = find_bin(counts, self.rank)

    def find_value(self, counts: NDArray[Any]) -> None:
        """Find the threshold among the low bits in the bin."""
        if not counts.any():  # an empty tensor
            return
        low, num_above, self.num_equal = find_bin(counts, self.rank - self.num_above)
        self.num_above += num_above
        self.value = _float_of_bits(self.bin << _HALF | low)

    def _count_pending(self) -> None:
        """Count what several blocks had in the bin: rarely, for the table is as large as a block."""
        if self._pending is not None and self._num_pending:
            self._count(self._pending[: self._num_pending])
        self._num_pending = 0

    def _count(self, low_bits: torch.Tensor) -> None:
        counts = _count(low_bits, NUM_LOW)
        self.counts = counts if self.counts is None else self.counts + counts


def _count(values: torch.Tensor, num_values: int) -> torch.Tensor:
    """Return how often each number occurs in `values`; overwrites them."""
    return values.bincount(minlength=num_values) if values.device.type == "cpu" else _count_apart(values, num_values)


def _drop_ties(delta: torch.Tensor, threshold: float, left: int, spare: torch.Tensor) -> int:
    """Set elements at the threshold to zero once as many were kept as may be, and return how many more may be."""
    is_equal = torch.eq(torch.abs(delta, out=spare), threshold, out=spare)
    num_equal = int(is_equal.count_nonzero().item())
    if num_equal > left:
        delta[is_equal.nonzero()[left:, 0]] = 0
    return left - min(left, num_equal)


def _low_bits(bits: torch.Tensor, spare: torch.Tensor) -> torch.Tensor:
    """Return the numbers that have no high bits, in a tensor of their own; overwrites `spare`."""
    if bits.device.type != "cpu":
        return bits[(bits >= 0) & (bits < NUM_LOW)]
    unsigned = bits.numpy().view(np.uint32)
    is_inside = spare.view(torch.uint8)[: bits.numel()].numpy().view(np.bool_)
    np.less(unsigned, np.uint32(NUM_LOW), out=is_inside)
    return torch.from_numpy(bits.numpy()[np.flatnonzero(is_inside)])


def count_equal(stored: Stored, source: int, *thresholds: int) -> list[int]:
    """Return how many elements of a delta, or of source 0, have the magnitudes with these bits."""
    where = *stored.sources(), source, stored.num_elements
    return [int(delta_loops.count_equal(*where, threshold, sum_loops.make_scratch(2))) for threshold in thresholds]


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


def _float_of_bits(bits: int) -> float:
    """Return the float32 that has these bits."""
    value: float = struct.unpack("<f", struct.pack("<I", bits))[0]
    return value


def _bits_of_float(value: float) -> int:
    """Return the bits of a float32."""
    bits: int = struct.unpack("<I", struct.pack("<f", value))[0]
    return bits
