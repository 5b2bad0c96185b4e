"""Memory and queues of a thread on its GPU, kept from one task to the next."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from itertools import accumulate, pairwise

import torch

from raymerge.pipeline.engine.gpu.streams import Mark, Queue, pin, unpin
from raymerge.pipeline.stores.buffers import BufferPool
from raymerge.pipeline.stores.files import Buffer, aligned

_own = threading.local()
"""Has the rooms of this thread as `rooms`."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """The needs of a task, in bytes."""

    room_nbytes: int
    """Memory on the GPU that sources wait in."""
    num_rooms: int
    staging_nbytes: int
    """Each of two buffers that sources go through."""
    scratch_nbytes: int
    out_nbytes: int
    """Results of one piece in one output, of which there are two on either side."""
    num_outputs: int

    def holds(self, other: Sizes) -> bool:
        """Return whether there is enough for another task, and no larger room than that has."""
        return self.room_nbytes == other.room_nbytes and self.join(other) == self

    def join(self, other: Sizes) -> Sizes:
        """Return what is enough for two tasks."""
        return Sizes(*(max(getattr(self, field.name), getattr(other, field.name)) for field in fields(Sizes)))


@dataclass(slots=True)
class Input:
    """Room for the sources of a fetch on the GPU."""

    there: torch.Tensor
    used: Mark | None = None
    """Mark after the kernels that work on it."""


@dataclass(slots=True)
class Staging:
    """A pinned buffer of the host that sources go through."""

    buffer: Buffer
    here: torch.Tensor
    """The same memory."""
    sent: Mark | None = None
    """Mark after its content has been copied out."""


@dataclass(slots=True)
class Output:
    """Room for one piece's results of one output, on the device and in pinned memory.

    The norm, and from `ALIGNMENT` the values as they are stored.
    """

    there: torch.Tensor
    here: torch.Tensor
    arrived: Mark | None = None
    name: str = ""
    dtype: torch.dtype = torch.float32
    nbytes: int = 0
    """Size of the values; 0 when they have been appended to the shard."""


class Rooms:
    """Everything that a stage on a GPU needs."""

    def __init__(self, device: torch.device, sizes: Sizes, queues: Sequence[Queue]) -> None:
        """Take the memory; that of the host is pinned at once, for it takes long.

        Raises:
            OutOfMemoryError: there is less on the GPU.
        """
        self.device = device
        self.sizes = sizes
        self.queues = queues
        self.inputs = [Input(self._make(sizes.room_nbytes)) for _ in range(sizes.num_rooms)]
        self.scratch = self._make(aligned(sizes.scratch_nbytes))
        num_results = 2 * sizes.num_outputs
        places = [0, *accumulate([aligned(sizes.staging_nbytes)] * 2 + [aligned(sizes.out_nbytes)] * num_results)]
        host = memoryview(BufferPool().acquire(places[-1]))
        here = torch.frombuffer(host, dtype=torch.uint8)
        if pin(here, device):
            # not at exit, when CUDA may be gone already
            weakref.finalize(self, partial(unpin, here)).atexit = False
        self.staging = [Staging(host[a:b], here[a:b]) for a, b in pairwise(places[:3])]
        results = [
            Output(self._make(sizes.out_nbytes), here[a : a + sizes.out_nbytes]) for a in places[2 : 2 + num_results]
        ]
        self.outputs = [results[k : k + 2] for k in range(0, num_results, 2)]

    def _make(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8, device=self.device)


def take_rooms(device: torch.device, sizes: Sizes, open_queue: Callable[[torch.device], Queue]) -> Rooms:
    """Return this thread's rooms, with enough for a task; nothing is under way in them.

    Raises:
        OutOfMemoryError: there is less on the GPU.
    """
    rooms: Rooms | None = getattr(_own, "rooms", None)
    if rooms is not None and rooms.device == device and rooms.sizes.holds(sizes):
        return rooms
    queues = [open_queue(device) for _ in range(3)] if rooms is None else rooms.queues
    if rooms is not None and rooms.sizes.room_nbytes == sizes.room_nbytes:
        sizes = sizes.join(rooms.sizes)
    drop_rooms()
    rooms = None
    if device.type == "cuda":
        torch.cuda.empty_cache()
    _own.rooms = made = Rooms(device, sizes, queues)
    return made


def drop_rooms() -> None:
    """Free this thread's rooms."""
    if hasattr(_own, "rooms"):
        del _own.rooms
