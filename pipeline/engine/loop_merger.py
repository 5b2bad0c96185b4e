"""Merges windows by compiled loops, from the bytes that were read to those that are written; without torch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from raymerge.ops.errors import SourceMismatchError
from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.lazy import np
from raymerge.ops.stored import STRIP, Slot, Stored, item_nbytes
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.runs import Figures, TensorRuns
from raymerge.pipeline.engine.tally import Tally, is_harmless
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.types import TensorMerge

if TYPE_CHECKING:
    from numpy.typing import NDArray


class LoopMerger:
    """Merges tensors that `takes_loops`, window by window: `add` for each, in order."""

    def __init__(self, shards: Sequence[ShardWriter], tallies: Sequence[Tally], figures: Sequence[Figures]) -> None:
        """Write to one shard for each output."""
        self._shards = shards
        self._tallies = tallies
        self._figures = figures
        self._squares = [np.zeros(STRIP, np.float32) for _ in shards]
        self._tensor: TensorRuns | None = None

    def add(self, filled: Filled) -> None:
        """Work off one window.

        Raises:
            TensorMismatchError: tensors that are copied differ between the inputs.
        """
        window, merge = filled.window, filled.window.merge
        if not merge.num_elements:
            return  # no bytes to write, and nothing for a kernel to see
        if self._tensor is None or self._tensor.merge is not merge:
            self._tensor = TensorRuns(merge)
        stored = Stored(window.start, window.stop, filled.buffer, filled.offsets, _list_dtypes(merge))
        is_last = window.stop == merge.num_elements
        for index in window.passes:
            if index < self._tensor.num_passes:
                for run in self._tensor.measuring_runs(index):
                    run.measure_stored(index, stored)
                if is_last:
                    self._tensor.end_pass(index)
                continue
            for output in range(len(self._shards)):
                self._combine(self._tensor, output, stored)
            if is_last:
                self._tensor.note_figures(self._figures)

    def _combine(self, tensor: TensorRuns, output: int, stored: Stored) -> None:
        """Append the results of a window to one output, as many at once as its buffer has room for."""
        run, shard, tally = tensor.combining_runs()[output], self._shards[output], self._tallies[output]
        dtype = DTYPES[tensor.merge.written_dtype]
        item = item_nbytes(dtype.torch_name)
        start = stored.start
        while start < stored.stop:
            room = shard.reserve()
            stop = min(stored.stop, start + len(room) // item)
            slot = Slot(room[: (stop - start) * item], dtype.torch_name, self._squares[output])
            before = _sum_up(slot.squares)
            try:
                finished = run.combine_stored(stored.cut(start, stop), slot)
            except SourceMismatchError as error:
                raise tensor.explain_difference(error.source) from error
            if dtype.is_mergeable:
                squares = finished
                pending = _sum_up(slot.squares)
                if stop == tensor.merge.num_elements or not is_harmless(finished + pending, slot.dtype):
                    squares += pending
                    slot.squares[:] = 0
                tally.add(tensor.merge.name, squares, slot.dtype, partial(_look, slot, before))
            shard.advance((stop - start) * item)
            start = stop


def _list_dtypes(merge: TensorMerge) -> tuple[str, ...]:
    return tuple(DTYPES[source.dtype].torch_name for source in merge.sources)


def _sum_up(squares: NDArray[Any]) -> float:
    return float(squares.sum(dtype=np.float64))


def _look(slot: Slot, before: float) -> tuple[float, bool]:
    """Return the sum of squares of what is in a slot and of what was before, and whether all in the slot is finite."""
    squares, is_finite = before, True
    step = BLOCK_ELEMENTS * item_nbytes(slot.dtype)
    for start in range(0, len(slot.buffer), step):
        values = Slot(slot.buffer[start : start + step], slot.dtype, slot.squares).read().astype(np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            squares += float(np.square(values).sum())
        is_finite = is_finite and bool(np.isfinite(values).all())
    return squares, is_finite
