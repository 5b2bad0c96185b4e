"""A GPU that is the CPU in disguise: it mixes nothing with what is on the host, and finds what is not waited for."""

from __future__ import annotations

import threading
import weakref
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from raymerge.pipeline.engine.gpu.streams import Mark, Queue

DEVICE = torch.device("meta")
"""What tensors on the GPU say: a device that torch knows without a driver."""

_HOST = "host"
_aten = torch.ops.aten
_MAKE = (
    _aten.arange.default,
    _aten.empty.memory_format,
    _aten.full.default,
    _aten.zeros.default,
    _aten.scalar_tensor.default,
)
_MOVE = (_aten._to_copy.default, _aten.copy_.default)
_WAIT = (_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.bincount.default)
_TOUCH_NOTHING = ("aten::view", "aten::slice", "aten::select", "aten::detach", "aten::alias", "aten::empty")


class GpuTensor(torch.Tensor):
    """Looks as if it lay on the GPU; its values are in `host`."""

    host: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> GpuTensor:
        made: GpuTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        made.host = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, *rest: Any) -> Any:
        raise AssertionError(f"{func} outside of the fake GPU's context")


Clock = dict[str, int]
"""For each queue how many of its operations are known to be done."""


@dataclass
class FakeMark(Mark):
    gpu: FakeGpu
    clock: Clock

    def synchronize(self) -> None:
        self.gpu.join(_HOST, self.clock)


class FakeQueue(Queue):
    def __init__(self, gpu: FakeGpu, name: str) -> None:
        self.gpu, self.name = gpu, name
        self.outer: list[str] = []  # a queue is used by one thread at a time

    def __enter__(self) -> None:
        self.outer.append(self.gpu.current)
        self.gpu.current = self.name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.gpu.current = self.outer.pop()

    def mark(self) -> Mark:
        return FakeMark(self.gpu, dict(self.gpu.clocks[self.name]))

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, FakeMark)
        self.gpu.join(self.name, mark.clock)


@dataclass
class _Access:
    start: int
    stop: int
    is_write: bool
    queue: str
    time: int
    what: str


class FakeGpu(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Use it as a context: operations are done at once, and each is checked to have waited for what it depends on."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._own = threading.local()
        self._lock = threading.RLock()
        self.clocks: dict[str, Clock] = defaultdict(lambda: defaultdict(int))
        self.accesses: dict[int, list[_Access]] = defaultdict(list)
        """Of queues: by address for each piece of memory on the GPU, and under 0 for the host's."""
        self.num_tensors: dict[int, int] = {}
        """For each piece of memory on the GPU."""
        self.num_there = self.most_there = 0
        """Bytes on the GPU."""
        self.capacity = 2**40
        self.num_queues = 0
        self.num_sent = 0
        """Bytes from the host."""

    @property
    def current(self) -> str:
        """The queue that this thread's operations go to."""
        queue: str = getattr(self._own, "queue", "default")
        return queue

    @current.setter
    def current(self, queue: str) -> None:
        self._own.queue = queue

    def open_queue(self, device: torch.device) -> FakeQueue:
        assert device == DEVICE
        self.num_queues += 1
        return FakeQueue(self, f"queue {self.num_queues}")

    def join(self, queue: str, other: Clock) -> None:
        own = self.clocks[queue]
        for name, time in other.items():
            own[name] = max(own[name], time)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with self._lock:
            return self._run(func, args, kwargs)

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, torch.Tensor)]
        is_there = [isinstance(tensor, GpuTensor) for tensor in tensors]
        device = kwargs.get("device")
        goes_there = device is not None and torch.device(device) == DEVICE
        comes_back = func in _MOVE and device is not None and not goes_there
        if func is _aten.copy_.default and is_there[0] and not is_there[1]:
            self.num_sent += tensors[1].nbytes
        if not (any(is_there) or goes_there):
            result = func(*args, **kwargs)
            self._note(func, args, kwargs, result, _HOST)
            return result
        for tensor, there in zip(tensors, is_there, strict=True):
            if not there and func not in _MOVE and tensor.dim():
                raise AssertionError(f"{func} mixes tensors of the GPU and of the host")
        assert not goes_there or func in (*_MAKE, *_MOVE), func
        if device is not None:
            kwargs["device"] = "cpu"
        inner_args, inner_kwargs = tree_map(_unwrap, (args, kwargs))
        result = func(*inner_args, **inner_kwargs)
        is_queued = inner_kwargs.get("non_blocking") or (func is _aten.copy_.default and True in inner_args[2:])
        self._note(func, inner_args, inner_kwargs, result, self.current)
        if func in _WAIT or (func in _MOVE and not all(is_there) and not is_queued):
            self.join(_HOST, self.clocks[self.current])
        if func is _aten._local_scalar_dense.default or comes_back:
            return result
        if func is _aten.copy_.default and not is_there[0]:
            return args[0]
        return self._wrap(func, args, kwargs, result)

    def _wrap(self, func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        """Return what was given as `out` or changed in place as it was given."""
        known = {id(leaf.host): leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, GpuTensor)}

        def wrap(leaf: Any) -> Any:
            if not isinstance(leaf, torch.Tensor):
                return leaf
            return known[id(leaf)] if id(leaf) in known else self._keep(leaf)

        return tree_map(wrap, result)

    def _keep(self, inner: torch.Tensor) -> GpuTensor:
        """Count the memory as long as there are tensors in it."""
        address, nbytes = inner.untyped_storage().data_ptr(), inner.untyped_storage().nbytes()
        if address not in self.num_tensors:
            if self.num_there + nbytes > self.capacity:
                raise torch.OutOfMemoryError(f"{self.num_there} bytes are in use")
            self.num_there += nbytes
            self.most_there = max(self.most_there, self.num_there)
        self.num_tensors[address] = self.num_tensors.get(address, 0) + 1
        made = GpuTensor(inner)
        weakref.finalize(made, self._let_go, address, nbytes)
        return made

    def _let_go(self, address: int, nbytes: int) -> None:
        self.num_tensors[address] -= 1
        if not self.num_tensors[address]:
            self.num_there -= nbytes
            del self.num_tensors[address]
            self.accesses.pop(address, None)

    def _note(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any], result: Any, queue: str) -> None:
        """Note what an operation reads and writes, by its schema."""
        if func._schema.name in _TOUCH_NOTHING:
            return
        if queue != _HOST:
            self.join(queue, self.clocks[_HOST])
        named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
        writes = [a.name for a in func._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        written = {id(leaf) for name in writes for leaf in tree_flatten(named.get(name))[0]}
        self.clocks[queue][queue] += 1
        for leaf in tree_flatten((args, kwargs, result))[0]:
            if isinstance(leaf, torch.Tensor) and leaf.numel():
                is_there = leaf.untyped_storage().data_ptr() in self.num_tensors
                self.access(leaf, queue, str(func), is_write=id(leaf) in written, is_there=is_there)

    def access(self, tensor: torch.Tensor, queue: str, what: str, *, is_write: bool, is_there: bool) -> None:
        """Check an operation against those in queues on the same memory; what the host did before needs no waiting for.

        Raises:
            AssertionError: they could happen in either order.
        """
        start = tensor.data_ptr()
        now = _Access(start, start + tensor.nbytes, is_write, queue, self.clocks[queue][queue], what)
        before = self.accesses[tensor.untyped_storage().data_ptr() if is_there else 0]
        for other in before:
            is_conflict = (other.is_write or is_write) and other.start < now.stop and now.start < other.stop
            if is_conflict and self.clocks[queue][other.queue] < other.time:
                raise AssertionError(f"{what} in {queue} does not wait for {other.what} in {other.queue}")
        if queue != _HOST:
            before.append(now)

    def host_writes(self, buffer: memoryview) -> None:
        """Note that the host writes to a buffer without torch."""
        with _untracked():
            tensor = torch.frombuffer(buffer, dtype=torch.uint8)
        self.access(tensor, _HOST, "a fetch", is_write=True, is_there=False)


@contextmanager
def _untracked() -> Iterator[None]:
    with torch.utils._python_dispatch._disable_current_modes():
        yield


def _unwrap(leaf: Any) -> Any:
    return leaf.host if isinstance(leaf, GpuTensor) else leaf


def send(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy on the GPU, in whose context this is."""
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=DEVICE).copy_(tensor)
