"""Tables of counts, by the high and the low bits of magnitudes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from raymerge.ops.lazy import delta_loops, np, sum_loops
from raymerge.ops.stored import Stored

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

NUM_LOW = 2**16
NUM_HIGH = 2**15
"""Without the sign, 15 high bits are left."""

_PART = 256
"""Bins that are added up together before one is looked for among them."""

_NUM_KEPT, KEPT_NBYTES = 4, 16 * 2**20
"""Most tables of one size that are kept, and most bytes of all sizes together: sweeps have tables of many sizes."""

_TABLES: dict[int, list[NDArray[Any]]] = defaultdict(list)
"""Tables to count the next tensors in, by their size: fresh pages cost as much as counting a small one does."""


class HighCounts:
    """Counts of the high bits of magnitudes."""

    def __init__(self) -> None:
        self.table: torch.Tensor | NDArray[Any] | None = None
        self._counts: NDArray[Any] | None = None

    def read(self) -> NDArray[Any] | None:
        """Return the counts, or nothing where there were no elements; nothing is counted after that."""
        if self.table is not None:
            self._counts, self.table = read_table(self.table), None
        return self._counts


class LowCounts:
    """Counts of the low bits of the magnitudes in some bins."""

    def __init__(self, bins: Sequence[int], num_users: int) -> None:
        """Count in the bin of each threshold, of which some may be one, for sparsifiers that leave in the end."""
        self._rows = {each: row for row, each in enumerate(dict.fromkeys(bins), start=1)}
        self._num_users = num_users
        self._table = take_table(1 + len(bins))  # as large for each tensor; the first row counts what is in no bin
        self._starts = np.full(NUM_HIGH, -1, np.int32)
        for each, row in self._rows.items():
            self._starts[each] = row * NUM_LOW

    def count(self, stored: Stored, source: int) -> None:
        """Count what is there at once."""
        where = source, stored.num_elements
        delta_loops.count_bins(*stored.sources(), *where, self._starts, self._table, sum_loops.make_scratch(2))

    def read(self, searched: int) -> NDArray[Any]:
        """Return the counts of a bin, until the last user leaves."""
        start = self._rows[searched] * NUM_LOW
        return self._table[start : start + NUM_LOW]

    def leave(self) -> None:
        """Free the table, if nobody else uses it."""
        self._num_users -= 1
        if not self._num_users:
            _keep_table(self._table)


def take_table(num_rows: int) -> NDArray[Any]:
    """Return zeros to count in, in so many rows."""
    try:
        table = _TABLES[num_rows * NUM_LOW].pop()
    except IndexError:
        return np.zeros(num_rows * NUM_LOW, np.int64)
    table.fill(0)
    return table


def _keep_table(table: NDArray[Any]) -> None:
    """Keep a table that is no longer looked at for others."""
    kept_nbytes = sum(8 * size * len(tables) for size, tables in list(_TABLES.items()))
    kept = _TABLES[table.size]
    if len(kept) < _NUM_KEPT and kept_nbytes + table.nbytes <= KEPT_NBYTES:
        kept.append(table.reshape(-1))  # last: another thread may take it at once


def forget_tables() -> None:
    """Free the tables that are kept."""
    _TABLES.clear()


def read_table(counts: torch.Tensor | NDArray[Any]) -> NDArray[Any]:
    """Return counts where they can be looked at, and keep their table for others."""
    if not isinstance(counts, np.ndarray):
        return counts.cpu().numpy()
    read = counts.copy() if counts.ndim == 1 else counts.sum(0)
    _keep_table(counts)
    return read


def find_bin(counts: NDArray[Any], rank: int) -> tuple[int, int, int]:
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
