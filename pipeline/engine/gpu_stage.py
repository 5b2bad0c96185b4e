"""Windows on a GPU: the next one arrives and the last one's results leave while one is merged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from raymerge.pipeline.engine.host_stage import Stage
from raymerge.pipeline.engine.streams import Mark, open_queue, pinned
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.memory import ALIGNMENT, aligned
from raymerge.pipeline.stores.buffers import BufferPool


@dataclass(slots=True)
class _Input:
    """Room for one window's sources on the device."""

    there: torch.Tensor
    used: Mark | None = None
    """When the kernels that work on it are done."""


@dataclass(slots=True)
class _Output:
    """Room for one window's results, on the device and in pinned memory: their sum, and from `ALIGNMENT` the values."""

    there: torch.Tensor
    here: torch.Tensor
    arrived: Mark | None = None
    name: str = ""
    dtype: torch.dtype = torch.float32
    nbytes: int = 0
    """Of the values; 0 when they have been appended to the shard."""


class GpuStage(Stage):
    """Three queues: bytes come as they are stored, are converted and merged there, and leave as they will be stored.

    On any other device than a GPU everything happens at once, in the same order. Open it with `open_gpu_stage`.
    """

    takes_windows = True

    def __init__(
        self, shard: ShardWriter, device: torch.device, buffer_nbytes: int, outputs: Sequence[memoryview]
    ) -> None:
        super().__init__(shard)
        self.device = device
        self._upload, self._merge, self._download = (open_queue(device) for _ in range(3))
        self._inputs = [_Input(self._make_room(buffer_nbytes)) for _ in range(2)]
        self._outputs = [_Output(self._make_room(len(o)), torch.frombuffer(o, dtype=torch.uint8)) for o in outputs]

    @contextmanager
    def bring(self, views: Sequence[memoryview], dtypes: Sequence[torch.dtype]) -> Iterator[list[torch.Tensor]]:
        """Send the bytes; what is called meanwhile is queued behind their arrival."""
        room = self._inputs[0]
        self._inputs.reverse()
        if room.used is not None:
            self._upload.wait(room.used)
        sources = []
        offset = 0
        with self._upload:
            for view, dtype in zip(views, dtypes, strict=True):
                place = room.there[offset : offset + len(view)]
                place.copy_(torch.frombuffer(view, dtype=torch.uint8), non_blocking=True)
                sources.append(place.view(dtype))
                offset += aligned(len(view))
            arrived = self._upload.mark()
        self._merge.wait(arrived)
        with self._merge:
            yield sources
            room.used = self._merge.mark()
        arrived.synchronize()

    def write(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Queue the way back, and append meanwhile what came back before."""
        room = self._outputs[0]
        self._outputs.reverse()
        self._append(room)
        room.name, room.dtype, room.nbytes = name, dtype, len(values) * dtype.itemsize
        stop = ALIGNMENT + room.nbytes
        place = room.there[ALIGNMENT:stop].view(dtype)
        place.copy_(values)
        # float16 may overflow where float32 does not.
        total = (place if dtype is torch.float16 else values).sum(dtype=torch.float32)
        room.there[: total.itemsize].view(torch.float32).copy_(total)
        self._download.wait(self._merge.mark())
        with self._download:
            room.here[:stop].copy_(room.there[:stop], non_blocking=True)
            room.arrived = self._download.mark()

    def flush(self) -> None:
        """Wait for all results."""
        for room in self._outputs:
            self._append(room)

    def wait(self) -> None:
        """Wait until nothing is under way any more."""
        for queue in (self._upload, self._merge, self._download):
            queue.mark().synchronize()

    def _append(self, room: _Output) -> None:
        if room.arrived is None or not room.nbytes:
            return
        room.arrived.synchronize()
        self._note(room.name, float(room.here[: torch.float32.itemsize].view(torch.float32)))
        self._shard.append(room.here[ALIGNMENT : ALIGNMENT + room.nbytes].view(room.dtype), room.dtype)
        room.nbytes = 0

    def _make_room(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


@contextmanager
def open_gpu_stage(
    shard: ShardWriter, pool: BufferPool, device: torch.device, inputs: Sequence[memoryview], out_nbytes: int
) -> Iterator[GpuStage]:
    """Have a stage on a device for a while.

    Args:
        shard: where results go.
        pool: of the buffers that results come back to.
        device: a GPU; any other one behaves the same, for tests.
        inputs: the buffers that windows are fetched into.
        out_nbytes: room for the results of one window.
    """
    with ExitStack() as stack:
        outputs = stack.enter_context(pool.lend(out_nbytes, 2))
        stack.enter_context(pinned([*inputs, *outputs], device))
        stage = GpuStage(shard, device, len(inputs[0]), outputs)
        stack.callback(stage.wait)
        yield stage
