"""Rows gathered from matrices of which some are merges: what is needed of those is merged first, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from raymerge.ops.decoders.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.decoders.intermediate import Intermediate, Part
from raymerge.ops.decoders.rows import MEAN, GatherRows, Layout, RowMap, lay_out
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_ITEM_NBYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "float64": 8}


def find_share(element: int, num_elements: int, num_rows: int, columns: int) -> int:
    """Return how many elements of a part are measured with so many elements of the result.

    >>> [find_share(element, 8, 3, 2) for element in (0, 4, 8)]
    [0, 3, 6]
    """
    return element * num_rows * columns // max(1, num_elements)


def list_needed(rows: RowMap, part: int) -> NDArray[Any]:
    """Return which rows of a part are in the result or in a mean, each once and in their order."""
    parts, there = rows.spread(0, rows.num_rows)
    members = [row for k in there[parts == MEAN].tolist() for other, row in rows.means[k] if other == part]
    return np.unique(np.concatenate([there[parts == part], np.array(members, np.int64)]))


@dataclass(frozen=True, slots=True)
class GatherMergedRows(Decoder):
    """Rows from several matrices, of which some are merges.

    A merge is made block by block, from its first row to its last, so that its rows come out as they would if it were
    written and read again: a pass of its own keeps those that are needed, before any row is decoded.
    """

    parts: tuple[Part, ...]
    num_pieces: tuple[int, ...]
    """For each part that is no merge, the pieces of bytes that neighbouring rows of it take."""
    rows: RowMap
    columns: int
    padding: bytes = field(repr=False)
    """The mean of all rows before the padding, as float32; empty where there is no padding."""

    @property
    def num_passes(self) -> int:
        """Passes that the merges need, and one more to keep their rows."""
        return 1 + max(merge.num_passes for merge in self.merges.values())

    @property
    def merges(self) -> dict[int, Intermediate]:
        """The decoders of the parts that are merges, by position."""
        found = {position: part.decoder for position, part in enumerate(self.parts)}
        return {position: decoder for position, decoder in found.items() if isinstance(decoder, Intermediate)}

    @property
    def gathering(self) -> GatherRows:
        """Decoder that gathers the rows once those of merges are there."""
        merges = self.merges
        decoders = (Plain(merges[k].dtype) if k in merges else part.decoder for k, part in enumerate(self.parts))
        numbers = (1 if k in merges else number for k, number in enumerate(self.num_pieces))
        return GatherRows(tuple(decoders), tuple(numbers), self.rows, self.columns, self.padding)

    def find_bounds(self, position: int, start: int, stop: int) -> tuple[int, int]:
        """Return the elements of a merge that are measured with elements [start, stop) of the result."""
        columns = self.columns
        total, num_rows = self.rows.num_rows * columns, self.parts[position].num_elements // columns
        return find_share(start, total, num_rows, columns), find_share(stop, total, num_rows, columns)

    def state_nbytes(self, num_elements: int) -> int:
        """Return the memory of the rows that are kept, and of a block of each merge."""
        total = 0
        for position, merge in self.merges.items():
            kept = len(list_needed(self.rows, position)) * self.columns
            total += (kept + merge.grid) * _ITEM_NBYTES[merge.dtype] + merge.state_nbytes(merge.grid)
        return total

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the bytes that gathering takes, or the most demanding merge."""
        merges = (merge.temporary_nbytes(merge.grid) for merge in self.merges.values())
        return max(self.gathering.temporary_nbytes(num_elements), *merges)

    def start(self) -> Decoder:
        """Return a decoder that keeps rows of merges."""
        return _Run(self)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Decode nothing without having measured; see `Decoder.start`."""
        raise AssertionError("rows of merges are kept by a decoder that was started")


class _Kept:
    """The rows of one merge that are needed, rounded as they would have been written."""

    def __init__(self, needed: NDArray[Any], columns: int, dtype: torch.dtype) -> None:
        breaks = np.flatnonzero(np.diff(needed, prepend=-2) != 1)
        self.firsts = needed[breaks] * columns
        """First element of each run of neighbouring rows."""
        self.places = breaks * columns
        """First element of each run in what is kept."""
        self.stops = self.firsts + np.diff(np.append(breaks, len(needed))) * columns
        self._columns = columns
        self._dtype = dtype
        self._num_elements = len(needed) * columns
        self._values: torch.Tensor | None = None

    def enter(self, start: int, values: torch.Tensor) -> None:
        """Keep what is needed of neighbouring elements that begin at `start`."""
        if self._values is None:
            self._values = torch.empty(self._num_elements, dtype=self._dtype, device=values.device)
        stop = start + len(values)
        first = int(np.searchsorted(self.stops, start, side="right"))
        for run in range(first, int(np.searchsorted(self.firsts, stop, side="left"))):
            low, high = max(int(self.firsts[run]), start), min(int(self.stops[run]), stop)
            place = int(self.places[run]) + low - int(self.firsts[run])
            self._values[place : place + high - low].copy_(values[low - start : high - start])

    def find(self, row: int, count: int) -> torch.Tensor:
        """Return the bytes of neighbouring rows, all of which are kept."""
        assert self._values is not None
        run = int(np.searchsorted(self.stops, row * self._columns, side="right"))
        place = int(self.places[run]) + row * self._columns - int(self.firsts[run])
        return self._values[place : place + count * self._columns].view(torch.uint8)


class _Run(Decoder):
    """The rows of one tensor, on one worker."""

    def __init__(self, what: GatherMergedRows) -> None:
        self._what = what
        self._gathering = what.gathering
        self._merges = what.merges
        self._decoders = {position: merge.start() for position, merge in self._merges.items()}
        self._kept = {
            position: _Kept(list_needed(what.rows, position), what.columns, find_dtype(merge.dtype))
            for position, merge in self._merges.items()
        }
        self._room: dict[int, torch.Tensor] = {}
        """A block of each merge."""

    @property
    def num_passes(self) -> int:
        """As declared."""
        return self._what.num_passes

    def measure(self, index: int, raw: Raw, start: int, stop: int) -> None:
        """Measure the merges, or keep their rows, from the share of elements that goes with [start, stop)."""
        raws = self._split(raw)
        for position, decoder in self._decoders.items():
            bounds = self._what.find_bounds(position, start, stop)
            if index == self.num_passes - 1:
                self._keep(position, raws[position], *bounds)
            elif index < decoder.num_passes:
                decoder.measure(index, raws[position], *bounds)

    def end_pass(self, index: int) -> None:
        """Evaluate a measuring pass of the merges."""
        for decoder in self._decoders.values():
            if index < decoder.num_passes:
                decoder.end_pass(index)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Gather rows."""
        gathered = raw.memo.get("gathered")
        if gathered is None:
            layout = lay_out_rows(self._what, raw.start, raw.stop)
            pieces = self._list_pieces(layout, raw.pieces)
            gathered = raw.memo["gathered"] = Raw(pieces, raw.start, raw.stop, {"rows": layout})
        return self._gathering.decode(gathered, start, stop, out)

    def _keep(self, position: int, raw: Raw, start: int, stop: int) -> None:
        """Merge the blocks of some elements, and keep what is needed of them."""
        merge = self._merges[position]
        for first in range(start // merge.grid * merge.grid, stop, merge.grid):
            low, high = max(first, start), min(first + merge.grid, stop)
            if position not in self._room:
                device = next((piece.device for piece in raw.pieces), torch.device("cpu"))
                self._room[position] = torch.empty(merge.grid, dtype=find_dtype(merge.dtype), device=device)
            values = self._room[position][: high - low]
            self._kept[position].enter(low, self._decoders[position].decode(raw, low, high, values))

    def _split(self, raw: Raw) -> dict[int, Raw]:
        """Return each merge's pieces: they come after those of all rows that are stored."""
        if "merges" not in raw.memo:
            what = self._what
            layout = lay_out_rows(what, raw.start, raw.stop)
            place = sum(what.num_pieces[part] for part, _, _ in layout.spans if part not in self._merges)
            found: dict[int, Raw] = {}
            for position in self._merges:
                start, stop = what.find_bounds(position, raw.start, raw.stop)
                count = len(what.parts[position].ranges(start, stop)) if start < stop else 0
                found[position] = Raw(raw.pieces[place : place + count], start, stop)
                place += count
            raw.memo["merges"] = found
        merges: dict[int, Raw] = raw.memo["merges"]
        return merges

    def _list_pieces(self, layout: Layout, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the pieces of all spans: as they were read, and of merges as they are kept."""
        found: list[torch.Tensor] = []
        place = 0
        for part, row, count in layout.spans:
            if part in self._kept:
                found.append(self._kept[part].find(row, count))
                continue
            number = self._what.num_pieces[part]
            found += pieces[place : place + number]
            place += number
        return found


def lay_out_rows(what: GatherMergedRows, start: int, stop: int) -> Layout:
    """Return how the rows that hold elements [start, stop) of the result are read."""
    return lay_out(what.rows, start // what.columns, -(-stop // what.columns))
