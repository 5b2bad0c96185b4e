"""Intermediate merges by compiled loops: their values are written to the window's buffer, in front of their sources."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from raymerge.ops.decoders.decoder import Decoder, Plain
from raymerge.ops.decoders.intermediate import Intermediate
from raymerge.ops.kernel import KernelRun
from raymerge.ops.lazy import np
from raymerge.ops.stored import PIECE_ELEMENTS, STRIP, RunAll, Slot, Stored, item_nbytes
from raymerge.pipeline.engine.threads import run_in_turn
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.stores.files import Buffer, aligned

_DECODED_ELEMENTS = 2**21
"""Elements that one of several threads decodes by itself."""


def find_loop_dtype(decoder: Decoder) -> str:
    """Return the dtype in which loops get the values of a source, by torch's word for it."""
    return decoder.dtype if isinstance(decoder, Plain | Intermediate) else "float32"


def decode_stored(
    decoder: Decoder,
    pieces: Sequence[memoryview],
    span: tuple[int, int],
    buffer: Buffer,
    offset: int,
    run_all: RunAll,
) -> None:
    """Decode what is not stored as loops know it, into the room that is kept for it.

    Args:
        decoder: of the source; it has loops.
        pieces: the bytes of its ranges.
        span: the elements that they were fetched for.
        buffer: where the values go, as float32.
        offset: where they begin.
        run_all: decodes several pieces at once.
    """
    start, stop = span
    out = np.frombuffer(memoryview(buffer)[offset : offset + 4 * (stop - start)], np.float32)
    step = max(1, stop - start) if run_all is run_in_turn else _DECODED_ELEMENTS
    cuts = [(begin, min(begin + step, stop)) for begin in range(start, stop, step)]
    run_all(
        [
            partial(decoder.decode_stored, pieces, span, begin, end, out[begin - start : end - start])
            for begin, end in cuts
        ]
    )


class LoopIntermediate:
    """One source that is a merge itself, on one worker.

    For each window, `place`; for the passes that it needs before its values are there, `measure` and, after the last
    window, `end_pass`; and `make`, as often as anybody likes. Windows are whole blocks of its grid.
    """

    def __init__(self, source: MergedTensor, run_all: RunAll) -> None:
        """Begin with a tensor.

        Args:
            source: its sources are such as loops take, or such merges.
            run_all: runs the pieces of a window.
        """
        self._decoder = source.decoder
        self._sources = source.merge.sources
        self._run_all = run_all
        self._parts = [LoopIntermediate(s, run_all) if isinstance(s, MergedTensor) else None for s in self._sources]
        self._dtypes = tuple(find_loop_dtype(part.decoder) for part in self._sources)
        self._measured = self._decoder.kernel.start(self._decoder.site)
        self._run: KernelRun | None = None
        """Combines all windows in order; another one does in the next pass."""
        self._waiting: list[Callable[[], Any]] = []
        """Sources of the window that are still to be decoded."""
        self._is_made = False
        self._squares = [np.zeros(STRIP, np.float32)]

    @property
    def num_passes(self) -> int:
        """Measuring passes over its sources."""
        return self._decoder.num_passes

    def place(self, start: int, stop: int, buffer: Buffer, offset: int) -> None:
        """Find the places of a window's sources and values, which begin where its own room does.

        Args:
            start: of the window.
            stop: of the window: [start, stop).
            buffer: has the bytes of the sources, and the room.
            offset: where the room begins.
        """
        own = aligned((stop - start) * item_nbytes(self._decoder.dtype))
        room = own + sum(source.decoded_nbytes(stop - start) for source in self._sources)
        self._place(start, stop, memoryview(buffer), offset, offset + room)

    def measure(self, index: int) -> None:
        """Take the figures of a pass from the window."""
        num_parts = self._decoder.num_part_passes
        if index >= num_parts:
            self._make_parts()
            self._measured.measure_stored(index - num_parts, self._stored, self._run_all)
            return
        for part in filter(None, self._parts):
            if index < part.num_passes:
                part.measure(index)

    def end_pass(self, index: int) -> None:
        """Evaluate a pass."""
        num_parts = self._decoder.num_part_passes
        if index >= num_parts:
            self._measured.end_pass(index - num_parts)
            return
        for part in filter(None, self._parts):
            if index < part.num_passes:
                part.end_pass(index)

    def make(self) -> None:
        """Make the values of the window, unless they are there."""
        if self._is_made:
            return
        self._make_parts()
        stored = self._stored
        if self._run is None or stored.start == 0:
            self._run = self._measured.share(self._decoder.kernel)
        item = item_nbytes(self._decoder.dtype)
        pieces = stored.split(PIECE_ELEMENTS)
        is_alone = self._run_all is run_in_turn or len(pieces) == 1
        runs: Sequence[KernelRun] = [self._run] * len(pieces) if is_alone else self._run.fork(pieces, self._run_all)
        while len(self._squares) < len(pieces):
            self._squares.append(np.zeros(STRIP, np.float32))
        calls = []
        for run, piece, squares in zip(runs, pieces, self._squares, strict=False):
            first, last = ((bound - stored.start) * item for bound in (piece.start, piece.stop))
            slot = Slot(self._values[first:last], self._decoder.dtype, squares)
            calls.append(partial(run.combine_stored, piece, slot))
        self._run_all(calls)
        self._is_made = True

    def _place(self, start: int, stop: int, buffer: memoryview, room: int, offset: int) -> tuple[int, int]:
        """Return where the room and the bytes of what comes next begin."""
        nbytes = (stop - start) * item_nbytes(self._decoder.dtype)
        self._values = buffer[room : room + nbytes]
        room += aligned(nbytes)
        self._waiting = []
        self._is_made = False
        offsets = []
        for part, source in zip(self._parts, self._sources, strict=True):
            if part is not None:
                offsets.append(room)
                room, offset = part._place(start, stop, buffer, room, offset)
                continue
            pieces = []
            first = offset
            for piece in source.ranges(start, stop):
                pieces.append(buffer[offset : offset + piece.nbytes])
                offset += aligned(piece.nbytes)
            if isinstance(source.decoder, Plain):
                offsets.append(first)
                continue
            decode = partial(decode_stored, source.decoder, pieces, (start, stop), buffer, room, self._run_all)
            self._waiting.append(decode)
            offsets.append(room)
            room += source.decoded_nbytes(stop - start)
        self._stored = Stored(start, stop, buffer, tuple(offsets), self._dtypes)
        return room, offset

    def _make_parts(self) -> None:
        while self._waiting:
            self._waiting.pop()()
        for part in filter(None, self._parts):
            part.make()
