"""CUDA streams, events and pinned memory."""

from __future__ import annotations

from types import TracebackType

import torch


class Mark:
    """A point in a queue, reached when everything queued before it is done; here at once."""

    def synchronize(self) -> None:
        """Have the caller wait for it."""


class Queue:
    """Does what is called in its context one after the other; here, where there is no GPU, at once."""

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        pass

    def mark(self) -> Mark:
        """Return the point that the queue has got to now."""
        return Mark()

    def wait(self, mark: Mark) -> None:
        """Have what is queued from now on wait for a point in another queue."""


class _CudaMark(Mark):
    def __init__(self, stream: torch.cuda.Stream) -> None:
        self.event = torch.cuda.Event()
        self.event.record(stream)

    def synchronize(self) -> None:
        self.event.synchronize()


class _CudaQueue(Queue):
    """A CUDA stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)
        self._context = torch.cuda.stream(self._stream)

    def __enter__(self) -> None:
        self._context.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._context.__exit__(kind, error, traceback)

    def mark(self) -> Mark:
        return _CudaMark(self._stream)

    def wait(self, mark: Mark) -> None:
        assert isinstance(mark, _CudaMark)
        self._stream.wait_event(mark.event)


def open_queue(device: torch.device) -> Queue:
    """Return a queue of a device."""
    return _CudaQueue(device) if device.type == "cuda" else Queue()


def pin(memory: torch.Tensor, device: torch.device) -> bool:
    """Let a GPU read and write memory of the host by itself; return whether it is one that does.

    From other memory a copy is not queued: the caller would do it, twice. Pages are touched for it, which takes 0.3 s
    for each GB, so it is worth keeping.
    """
    if device.type != "cuda":
        return False
    torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0))
    return True


def unpin(memory: torch.Tensor) -> None:
    """Undo `pin`."""
    torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
