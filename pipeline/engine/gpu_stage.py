"""Windows on a GPU: the next one arrives and the last one's results leave while one is merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from raymerge.pipeline.engine.stage import Stage
from raymerge.pipeline.engine.streams import Mark, open_queue, pinned
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import ALIGNMENT, aligned


@dataclass(slots=True)
class _Input:
    """Room for one window's sources on the device."""

    there: torch.Tensor
    used: Mark | None = None
    """When the kernels that work on it are done."""


@dataclass(slots=True)
class _Output:
    """Room for one window's results of one output, on the device and in pinned memory.

    The sum of their squares, and from `ALIGNMENT` the values as they are stored.
    """

    there: torch.Tensor
    here: torch.Tensor
    arrived: Mark | None = None
    name: str = ""
    dtype: torch.dtype = torch.float32
    nbytes: int = 0
    """Size of the values; 0 when they have been appended to the shard."""


class GpuStage(Stage):
    """Three queues: bytes come as they are stored, are converted and merged there, and leave as they will be stored.

    On any other device than a GPU everything happens at once, in the same order. Open it with `open_gpu_stage`.
    """

    takes_windows = True

    def __init__(
        self,
        shards: Sequence[ShardWriter],
        device: torch.device,
        buffer_nbytes: int,
        outputs: Sequence[Sequence[memoryview]],
    ) -> None:
        super().__init__(shards)
        self.device = device
        self._upload, self._merge, self._download = (open_queue(device) for _ in range(3))
        self._inputs = [_Input(self._make_room(buffer_nbytes)) for _ in range(2)]
        self._outputs = [
            [_Output(self._make_room(len(room)), torch.frombuffer(room, dtype=torch.uint8)) for room in rooms]
            for rooms in outputs
        ]

    @contextmanager
    def bring(self, views: Sequence[memoryview]) -> Iterator[list[torch.Tensor]]:
        """Send the bytes; what is called meanwhile is queued behind their arrival."""
        room = self._inputs[0]
        self._inputs.reverse()
        if room.used is not None:
            self._upload.wait(room.used)
        sources = []
        offset = 0
        with self._upload:
            for view in views:
                place = room.there[offset : offset + len(view)]
                if len(view):
                    place.copy_(torch.frombuffer(view, dtype=torch.uint8), non_blocking=True)
                sources.append(place)
                offset += aligned(len(view))
            arrived = self._upload.mark()
        self._merge.wait(arrived)
        with self._merge:
            yield sources
            room.used = self._merge.mark()
        arrived.synchronize()

    def write(self, output: int, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Queue the way back, and append meanwhile what came back before."""
        room = self._outputs[output][0]
        self._outputs[output].reverse()
        self._append(output, room)
        room.name, room.dtype, room.nbytes = name, dtype, len(values) * dtype.itemsize
        stop = ALIGNMENT + room.nbytes
        room.there[ALIGNMENT:stop].view(dtype).copy_(values)
        if dtype.is_floating_point:
            room.there[: values.itemsize].view(values.dtype).copy_(torch.dot(values, values))
        self._download.wait(self._merge.mark())
        with self._download:
            room.here[:stop].copy_(room.there[:stop], non_blocking=True)
            room.arrived = self._download.mark()

    def flush(self) -> None:
        """Wait for all results."""
        for output, rooms in enumerate(self._outputs):
            for room in rooms:
                self._append(output, room)

    def wait(self) -> None:
        """Wait until nothing is under way any more."""
        for queue in (self._upload, self._merge, self._download):
            queue.mark().synchronize()

    def _append(self, output: int, room: _Output) -> None:
        if room.arrived is None or not room.nbytes:
            return
        room.arrived.synchronize()
        values = room.here[ALIGNMENT : ALIGNMENT + room.nbytes].view(room.dtype)
        if room.dtype.is_floating_point:
            squares = float(room.here[: torch.float32.itemsize].view(torch.float32))
            self.tallies[output].add(room.name, squares, values, room.dtype)
        self._shards[output].append(values, room.dtype)
        room.nbytes = 0

    def _make_room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


@contextmanager
def open_gpu_stage(
    shards: Sequence[ShardWriter],
    pool: BufferPool,
    device: torch.device,
    inputs: Sequence[memoryview],
    out_nbytes: int,
) -> Iterator[GpuStage]:
    """Have a stage on a device for a while.

    Args:
        shards: where results go, one for each output.
        pool: of the buffers that results come back to.
        device: a GPU; any other one behaves the same, for tests.
        inputs: the buffers that windows are fetched into.
        out_nbytes: room for the results of one window in one output.
    """
    with ExitStack() as stack:
        rooms = stack.enter_context(pool.lend(out_nbytes, 2 * len(shards)))
        stack.enter_context(pinned([*inputs, *rooms], device))
        stage = GpuStage(shards, device, len(inputs[0]), [rooms[k : k + 2] for k in range(0, len(rooms), 2)])
        stack.callback(stage.wait)
        yield stage
