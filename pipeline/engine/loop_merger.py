"""Merges windows by compiled loops, from the bytes that were read to those that are written; without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import repeat

from raymerge.ops.decoders.decoder import Plain
from raymerge.ops.errors import SourceMismatchError
from raymerge.ops.kernel import BLOCK_ELEMENTS, KernelRun
from raymerge.ops.lazy import np
from raymerge.ops.stored import PIECE_ELEMENTS, STRIP, RunAll, Slot, Stored, item_nbytes
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.gathered import Gatherer
from raymerge.pipeline.engine.loop_intermediate import LoopIntermediate, decode_stored, find_loop_dtype
from raymerge.pipeline.engine.runs import Figures, TensorRuns
from raymerge.pipeline.engine.tally import Tally, is_harmless
from raymerge.pipeline.engine.threads import run_in_turn
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.types import TensorMerge


class LoopMerger:
    """Merges tensors that `takes_loops`, window by window: `add` for each, in order."""

    def __init__(
        self,
        shards: Sequence[ShardWriter],
        tallies: Sequence[Tally],
        figures: Sequence[Figures],
        run_all: RunAll,
    ) -> None:
        """Write to one shard for each output.

        Args:
            shards: in the order of the task's outputs.
            tallies: of the shards.
            figures: of the shards.
            run_all: runs the pieces of a window.
        """
        self._shards = shards
        self._tallies = tallies
        self._figures = figures
        self._run_all = run_all
        self._squares = np.zeros((len(shards), STRIP), np.float32)
        self._pending = [0.0] * len(shards)
        """Sums of the squares that are not entered yet."""
        self._tensor: TensorRuns | None = None
        self._early: dict[int, LoopIntermediate] = {}
        """Its sources that are merges themselves, by their positions."""
        self._gatherer = Gatherer()

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
            self._early = {
                position: LoopIntermediate(source, self._run_all)
                for position, source in enumerate(merge.sources)
                if isinstance(source, MergedTensor)
            }
        self._decode(filled)
        is_last = window.stop == merge.num_elements
        num_early = max((source.num_passes for source in self._early.values()), default=0)
        for number in window.passes:
            index = number - num_early
            if index < 0:
                self._measure_early(number, is_last=is_last)
                continue
            for source in self._early.values():
                source.make()
            if index < self._tensor.num_passes:
                runs = [run for _, run in self._tensor.measuring_runs(index)]
                for stored in self._cut(filled):
                    runs[0].measure_outputs(index, runs, stored, self._run_all)
                if is_last:
                    self._tensor.end_pass(index)
                continue
            for stored in self._cut(filled):
                self._combine(self._tensor, stored)
            if is_last:
                self._tensor.note_figures(self._figures)

    def _decode(self, filled: Filled) -> None:
        """Decode what is not stored as loops know it; merges that are sources find the places of their values."""
        window = filled.window
        span = window.start, window.stop
        sources = zip(window.merge.sources, filled.views, filled.offsets, window.needed, strict=True)
        for position, (source, views, offset, needed) in enumerate(sources):
            if position in self._early:
                self._early[position].place(*span, filled.buffer, offset)
            elif all(needed) and not isinstance(source.decoder, Plain) and source.decoder.has_loops:
                decode_stored(source.decoder, views, span, filled.buffer, offset, self._run_all)

    def _measure_early(self, number: int, *, is_last: bool) -> None:
        """Take a pass that sources which are merges themselves need before they have values."""
        for source in self._early.values():
            if number < source.num_passes:
                source.measure(number)
                if is_last:
                    source.end_pass(number)

    def _cut(self, filled: Filled) -> Iterable[Stored]:
        """Return a window as it is, or in pieces where a source is gathered from rows."""
        merge = filled.window.merge
        if any(isinstance(source, GatheredRows) for source in merge.sources):
            return self._gatherer.cut(filled)
        return [Stored(filled.window.start, filled.window.stop, filled.buffer, filled.offsets, _list_dtypes(merge))]

    def _combine(self, tensor: TensorRuns, stored: Stored) -> None:
        """Append the results of a window to all outputs, as many at once as their buffers have room for."""
        dtype = DTYPES[tensor.merge.written_dtype]
        item = item_nbytes(dtype.torch_name)
        runs = tensor.combining_runs()
        start = stored.start
        while start < stored.stop:
            rooms = [shard.reserve() for shard in self._shards]
            stop = min(stored.stop, start + min(map(len, rooms)) // item)
            pieces = stored.cut(start, stop).split(PIECE_ELEMENTS)
            slots: list[list[Slot]] = []
            squares = self._squares
            for piece in pieces:
                squares = np.zeros_like(squares) if slots else squares
                span = slice((piece.start - start) * item, (piece.stop - start) * item)
                places = [room[span] for room in rooms]
                slots.append([Slot(*each) for each in zip(places, repeat(dtype.torch_name), squares, strict=False)])
            before = self._pending.copy()
            forks: list[Sequence[KernelRun]] = [runs] * len(pieces)
            if self._run_all is not run_in_turn and len(pieces) > 1:
                forks = list(zip(*(run.fork(pieces, self._run_all) for run in runs), strict=True))
            calls = [
                partial(each[0].combine_outputs, each, piece, outs)
                for each, piece, outs in zip(forks, pieces, slots, strict=True)
            ]
            try:
                finished = self._run_all(calls)
            except SourceMismatchError as error:
                raise tensor.explain_difference(error.source) from error
            if dtype.is_mergeable:
                for piece, outs, sums in zip(pieces, slots, finished, strict=True):
                    for output, (slot, total) in enumerate(zip(outs, sums, strict=True)):
                        self._note(tensor.merge, output, piece, slot, total, before[output])
                    before = [0.0] * len(before)
            self._squares = squares
            for shard in self._shards:
                shard.advance((stop - start) * item)
            start = stop

    def _note(self, merge: TensorMerge, output: int, piece: Stored, slot: Slot, finished: float, before: float) -> None:
        """Enter the squares of a piece: those of finished blocks, and what else can be told already."""
        pending = float(slot.squares.sum(dtype=np.float64))
        if piece.stop == merge.num_elements or not is_harmless(finished + pending, slot.dtype):
            finished += pending
            pending = 0.0
            slot.squares[:] = 0
        self._pending[output] = pending
        self._tallies[output].add(merge.name, finished, slot.dtype, partial(_look, slot, before))


def _list_dtypes(merge: TensorMerge) -> tuple[str, ...]:
    return tuple(find_loop_dtype(source.decoder) for source in merge.sources)


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
