"""Windows on a GPU: the next one arrives and the last one's results leave while one is merged."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock

import torch

from raymerge.pipeline.engine.fetch import Filled, fill_ahead, read_ranges
from raymerge.pipeline.engine.gpu.rooms import Input, Output, Rooms, Sizes, drop_rooms, take_rooms
from raymerge.pipeline.engine.gpu.streams import Mark, open_queue
from raymerge.pipeline.engine.stage import Stage, unify_nans
from raymerge.pipeline.engine.tally import Tally
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.memory.windows import Fetch, Window
from raymerge.pipeline.stores.files import ALIGNMENT, ByteRange, aligned
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.ranges import GAP_NBYTES


@dataclass(frozen=True, slots=True)
class _Sent(Filled):
    """A window whose bytes are on their way to the device."""

    sources: list[list[torch.Tensor]]
    room: Input
    arrived: Mark


class GpuStage(Stage):
    """Three queues: bytes come as they are stored, are converted and merged there, and leave as they will be stored.

    Sources are sent once, and stay for all passes of their window. On any other device than a GPU everything happens at
    once, in the same order. Open it with `open_gpu_stage`.
    """

    def __init__(
        self, shards: Sequence[ShardWriter], tallies: Sequence[Tally], rooms: Rooms, piece_nbytes: int
    ) -> None:
        super().__init__(shards, tallies)
        self.piece_nbytes = piece_nbytes
        self._rooms = rooms
        self._upload, self._merge, self._download = rooms.queues
        for output in rooms.outputs:
            for room in output:
                room.nbytes = 0

    def fetch(
        self, stores: Stores, fetches: Iterable[Fetch], on_read: Callable[[int], None]
    ) -> Generator[Filled, None, None]:
        """Yield a task's windows, on their way to the device.

        Args:
            stores: that have the inputs.
            fetches: in order.
            on_read: told of so many bytes that have arrived, often, in the caller's thread.

        Raises:
            FetchError: a range could not be read, or its file has changed.
        """
        turns = Lock()  # there is one pair of buffers to go through

        def send(fetch: Fetch, number: int, on_read: Callable[[int], None]) -> list[Filled]:
            with turns:
                return self._send(stores, fetch, self._rooms.inputs[number], on_read)

        if len(self._rooms.inputs) > 1:
            yield from fill_ahead(send, fetches, on_read)
        else:
            for fetch in fetches:
                yield from send(fetch, 0, on_read)

    def _send(self, stores: Stores, fetch: Fetch, room: Input, on_read: Callable[[int], None]) -> list[Filled]:
        """Read a fetch, piece by piece, and send each piece while the next one is read."""
        ranges: list[tuple[ByteRange, int]] = []
        windows: list[tuple[Window, list[list[torch.Tensor]]]] = []
        offset = 0
        for window in fetch:
            sources = []
            for pieces, needed in zip(window.ranges, window.needed, strict=True):
                places = []
                for piece, is_needed in zip(pieces, needed, strict=True):
                    places.append(room.there[offset : offset + piece.nbytes])
                    if is_needed:
                        ranges.append((piece, offset))
                    offset += aligned(piece.nbytes)
                sources.append(places)
            windows.append((window, sources))
        if room.used is not None:
            self._upload.wait(room.used)
        for start, stop, parts in cut_ranges(ranges, self._rooms.sizes.staging_nbytes):
            staging = self._rooms.staging[0]
            self._rooms.staging.reverse()
            if staging.sent is not None:
                staging.sent.synchronize()
            views = [staging.buffer[place - start : place - start + part.nbytes] for part, place in parts]
            max_gap = GAP_NBYTES if any(window.is_gathered for window in fetch) else 0
            read_ranges(stores, [part for part, _ in parts], views, on_read, max_gap=max_gap)
            with self._upload:
                room.there[start:stop].copy_(staging.here[: stop - start], non_blocking=True)
                staging.sent = self._upload.mark()
        arrived = self._upload.mark()
        return [_Sent(window, (), memoryview(b""), (), sources, room, arrived) for window, sources in windows]

    @contextmanager
    def bring(self, filled: Filled) -> Iterator[list[list[torch.Tensor]]]:
        """Have what is called meanwhile queued behind the arrival of the bytes."""
        assert isinstance(filled, _Sent)
        self._merge.wait(filled.arrived)
        with self._merge:
            yield filled.sources
            filled.room.used = self._merge.mark()

    def make_scratch(self, nbytes: int) -> torch.Tensor:
        """Return the scratch of the rooms."""
        return self._rooms.scratch

    def write(self, output: int, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Queue the way back, and append meanwhile what came back before."""
        room = self._rooms.outputs[output][0]
        self._rooms.outputs[output].reverse()
        self._append(output, room)
        room.name, room.dtype, room.nbytes = name, dtype, len(values) * dtype.itemsize
        stop = ALIGNMENT + room.nbytes
        room.there[ALIGNMENT:stop].view(dtype).copy_(values)
        if dtype.is_floating_point:  # `dot` would have cuBLAS take time and memory
            room.there[: torch.float32.itemsize].view(torch.float32).copy_(torch.linalg.vector_norm(values))
        self._download.wait(self._merge.mark())
        with self._download:
            room.here[:stop].copy_(room.there[:stop], non_blocking=True)
            room.arrived = self._download.mark()

    def flush(self) -> None:
        """Wait for all results."""
        for output, rooms in enumerate(self._rooms.outputs):
            for room in rooms:
                self._append(output, room)

    def wait(self) -> None:
        """Wait until nothing is under way any more."""
        for queue in self._rooms.queues:
            queue.mark().synchronize()

    def _append(self, output: int, room: Output) -> None:
        if room.arrived is None or not room.nbytes:
            return
        room.arrived.synchronize()
        values = room.here[ALIGNMENT : ALIGNMENT + room.nbytes].view(room.dtype)
        if room.dtype.is_floating_point:
            norm = float(room.here[: torch.float32.itemsize].view(torch.float32))
            if not math.isfinite(norm):
                unify_nans(values)
            self._note(output, room.name, norm * norm, values, room.dtype)
        self._shards[output].append(values, room.dtype)
        room.nbytes = 0


@contextmanager
def open_gpu_stage(
    shards: Sequence[ShardWriter], tallies: Sequence[Tally], device: torch.device, sizes: Sizes, piece_nbytes: int
) -> Iterator[GpuStage]:
    """Have a stage on a device for a while.

    Args:
        shards: where results go, one for each output.
        tallies: of the shards.
        device: a GPU; any other one behaves the same, for tests.
        sizes: of what the task needs.
        piece_nbytes: bytes of the sources that are merged at once.

    Raises:
        OutOfMemoryError: there is less on the GPU.
    """
    stage = GpuStage(shards, tallies, take_rooms(device, sizes, open_queue), piece_nbytes)
    try:
        yield stage
    except BaseException:
        drop_rooms()  # for the next attempt, or for other threads
        raise
    finally:
        stage.wait()


def cut_ranges(
    ranges: Iterable[tuple[ByteRange, int]], nbytes: int
) -> Iterator[tuple[int, int, list[tuple[ByteRange, int]]]]:
    """Cut ranges and their places in memory at every multiple of `nbytes` there.

    Args:
        ranges: each with its first byte's place, in the order of these, without overlap.
        nbytes: of a span of memory, at most.

    Yields:
        For each span its first place, the place after its last byte, and the ranges in it with their places.
    """
    parts: list[tuple[ByteRange, int]] = []
    first = last = 0
    for item, place in ranges:
        start = 0
        while start < item.nbytes:
            if parts and place + start >= first + nbytes:
                yield first, last, parts
                parts = []
            if not parts:
                first = (place + start) // nbytes * nbytes
            stop = min(item.nbytes, first + nbytes - place)
            parts.append((ByteRange(item.file, item.start + start, item.start + stop), place + start))
            start, last = stop, place + stop
    if parts:
        yield first, last, parts
