"""In which pieces a task's inputs are fetched: pure planning, no I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress

from raymerge.ops.decoders.intermediate import has_aligned_grids
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.plan.memory.projection import Demand, measure_demand, measure_kept
from raymerge.pipeline.plan.sources.merged import MergedRows, MergedTensor
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.stores.files import ByteRange, ByteRows, aligned
from raymerge.pipeline.stores.ranges import GAP_NBYTES, coalesce
from raymerge.pipeline.stores.remote import PIECE_NBYTES
from raymerge.pipeline.urls import scheme_of


@dataclass(frozen=True, slots=True)
class Window:
    """Elements [start, stop) of every source of one output tensor, and what is done with them."""

    merge: TensorMerge
    start: int
    stop: int
    passes: range
    """Passes that run over it: one of them, or all; the one after the last measuring pass combines."""
    ranges: Sequence[tuple[ByteRange, ...]] = field(init=False, repr=False)
    """The bytes to fetch, for each source that is not read by row."""
    rows: Sequence[tuple[ByteRows, ...]] = field(init=False, repr=False)
    """Likewise, for each source that is."""
    needed: Sequence[tuple[bool, ...]] = field(init=False, repr=False)
    """For each source, which of its ranges or rows are read: all, but for passes before kernels see any values.

    What is not read has its place in a buffer all the same.
    """

    def __post_init__(self) -> None:
        """Look the ranges up, once."""
        sources, num_cut = self.merge.sources, self.merge.num_cut
        spans = [(self.start, self.stop) if k < num_cut else (0, s.num_elements) for k, s in enumerate(sources)]
        rows = [_find_rows(source, self.start, self.stop) for source in sources]
        each = list(zip(sources, spans, rows, strict=True))
        ranges = [() if by_row else source.ranges(*span) for source, span, by_row in each]
        needed = [(True,) * len(pieces or by_row) for pieces, by_row in zip(ranges, rows, strict=True)]
        if self.passes.stop <= self.merge.num_early_passes:
            needed = [
                (False,) * len(by_row) if by_row else source.find_early(self.passes.start, *span)
                for source, span, by_row in each
            ]
        object.__setattr__(self, "ranges", ranges)
        object.__setattr__(self, "rows", rows)
        object.__setattr__(self, "needed", needed)

    @property
    def wanted(self) -> list[ByteRange]:
        """The ranges that are read, one after the other."""
        return list(chain.from_iterable(map(compress, self.ranges, self.needed)))

    def nbytes(self) -> int:
        """Return the room that it takes in a buffer."""
        read = sum(aligned(piece.nbytes) for pieces in self.ranges for piece in pieces)
        by_row = sum(aligned(rows.nbytes) for parts in self.rows for rows in parts)
        return read + by_row + sum(self.decoded_nbytes())

    def decoded_nbytes(self) -> list[int]:
        """Return the room for the decoded values of each source, where compiled loops need that."""
        num_elements = self.stop - self.start
        return [source.decoded_nbytes(num_elements) for source in self.merge.sources]

    @property
    def is_gathered(self) -> bool:
        """Whether a source is gathered from rows, which may lie far from each other."""
        return any(isinstance(source, GatheredRows) for source in self.merge.sources)


def _find_rows(source: Source, start: int, stop: int) -> tuple[ByteRows, ...]:
    return source.find_rows(start, stop) if isinstance(source, GatheredRows) and source.is_by_row else ()


Fetch = tuple[Window, ...]
"""Windows that are fetched into one buffer together."""


def make_fetches(task: ShardTask) -> Iterator[Fetch]:
    """Yield the fetches of a task, in order; no fetch is larger than its buffer.

    Small windows are fetched together, but not more than are merged soon: the next are fetched meanwhile.
    """
    waiting: list[Window] = []
    most = min(task.buffer_nbytes, task.fetch_nbytes)
    room = most
    for merge in task.merges:
        for window in make_windows(merge, measure_demand(merge), task.buffer_nbytes, task.fetch_nbytes):
            nbytes = window.nbytes()
            if waiting and nbytes > room:
                yield tuple(waiting)
                waiting, room = [], most
            waiting.append(window)
            room -= nbytes
    if waiting:
        yield tuple(waiting)


def make_windows(merge: TensorMerge, demand: Demand, buffer_nbytes: int, fetch_nbytes: int) -> Iterator[Window]:
    """Yield the pieces of one tensor: the whole for all passes if it fits, else whole blocks, one pass after another.

    Blocks are never cut differently: windows hold whole blocks.

    Args:
        merge: the tensor.
        demand: of the tensor.
        buffer_nbytes: of a buffer, which holds one block at least.
        fetch_nbytes: of a tensor that is not kept, fetched at once where a block is not larger.
    """
    if not demand.kept_nbytes:
        buffer_nbytes = min(buffer_nbytes, demand.choose_fetch_nbytes(fetch_nbytes))
    if is_resident(merge, buffer_nbytes):
        yield Window(merge, 0, merge.num_elements, range(demand.num_passes + 1))
        return
    buffer_nbytes = min(buffer_nbytes, demand.choose_fetch_nbytes(fetch_nbytes))
    window_elements = (buffer_nbytes - demand.fixed_nbytes) // demand.block_nbytes * demand.block_elements
    for index in range(demand.num_passes + 1):
        for start in range(0, merge.num_elements, window_elements):
            stop = min(start + window_elements, merge.num_elements)
            yield Window(merge, start, stop, range(index, index + 1))


def is_resident(merge: TensorMerge, buffer_nbytes: int) -> bool:
    """Return whether all sources fit in one buffer, so that they are read once for all passes."""
    return measure_kept(merge) <= buffer_nbytes


def count_again(merge: TensorMerge, buffer_nbytes: int, fetch_nbytes: int) -> int:
    """Return the bytes that are read more than once.

    That is where a tensor's sources are not kept between its passes, and where blocks of merges on the way lie across
    the bounds of windows: these are read for both.

    Args:
        merge: the tensor.
        buffer_nbytes: of a buffer.
        fetch_nbytes: as for `make_windows`.
    """
    demand = measure_demand(merge)
    if not all(_is_cut_like(source, demand.block_elements) for source in merge.sources[: merge.num_cut]):
        whole = Window(merge, 0, merge.num_elements, range(demand.num_passes + 1))
        windows = make_windows(merge, demand, buffer_nbytes, fetch_nbytes)
        return sum(map(_count_read, windows)) - _count_read(whole)  # not `nbytes`: means of padding are read before
    if is_resident(merge, buffer_nbytes):
        return 0
    num_early, sources = merge.num_early_passes, [(source, source.num_elements) for source in merge.sources]
    early = (
        piece.nbytes
        for index in range(num_early)
        for source, stop in sources
        for piece in compress(source.ranges(0, stop), source.find_early(index, 0, stop))
    )
    return sum(early) + (merge.num_passes - num_early) * sum(source.nbytes for source, _ in sources)


def _is_cut_like(source: Source, grid: int) -> bool:
    """Tell whether whole blocks of so many elements need no byte of a source that other blocks need, too."""
    if isinstance(source, MergedTensor):
        return has_aligned_grids(source.decoder, grid)
    return not isinstance(source, MergedRows)


def _count_read(window: Window) -> int:
    each = zip(window.rows, window.needed, strict=True)
    by_row = sum(part.nbytes for parts, needed in each if any(needed) for part in parts)
    return sum(piece.nbytes for piece in window.wanted) + by_row


def count_gaps(task: ShardTask) -> int:
    """Return the bytes between scattered rows of stores that requests read along, in one pass."""
    gathered = [
        merge
        for merge in task.merges
        if any(isinstance(source, GatheredRows) and source.is_remote for source in merge.sources)
    ]
    total = 0
    for fetch in make_fetches(replace(task, merges=tuple(gathered))):
        windows = [window for window in fetch if window.passes.start == 0]
        every = (piece for window in windows for pieces in window.ranges for piece in pieces)
        ranges = [piece for piece in every if scheme_of(piece.file.url) != "file"]
        total += sum(group.nbytes for group in coalesce(ranges, max_nbytes=PIECE_NBYTES, max_gap=GAP_NBYTES))
        total -= sum(group.nbytes for group in coalesce(ranges, max_nbytes=PIECE_NBYTES))
    return total
