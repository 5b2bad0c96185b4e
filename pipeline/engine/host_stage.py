"""Where the values of a task are: how a window gets to the processor that merges it, and how the results come back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch

from raymerge.pipeline.engine.writer import ShardWriter


class Stage(ABC):
    """Moves values. For each window: `bring`, and while it is there `write` for its pieces, in their order.

    `flush` before anything else is appended to the shard, and at the end.
    """

    device: torch.device
    """Where tensors to work with are made."""
    takes_windows: bool
    """Whether a whole window is one piece for kernels, instead of a block."""

    def __init__(self, shard: ShardWriter) -> None:
        self._shard = shard
        self._nonfinite: dict[str, None] = {}

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinity among what was written."""
        return tuple(self._nonfinite)

    @abstractmethod
    def bring(
        self, views: Sequence[memoryview], dtypes: Sequence[torch.dtype]
    ) -> AbstractContextManager[list[torch.Tensor]]:
        """Have a window's sources on the device; the bytes in `views` are not needed any more after the context."""

    @abstractmethod
    def write(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append values of an output tensor to the shard, rounded to a dtype; sooner or later."""

    @abstractmethod
    def flush(self) -> None:
        """Append what has not been so far."""

    def _note(self, name: str, total: float) -> None:
        """Take note of a tensor with NaN or infinity: a sum is finite only if all values are."""
        if not abs(total) < float("inf"):
            self._nonfinite[name] = None


class HostStage(Stage):
    """The CPU works where the bytes are."""

    device = torch.device("cpu")
    takes_windows = False

    @contextmanager
    def bring(self, views: Sequence[memoryview], dtypes: Sequence[torch.dtype]) -> Iterator[list[torch.Tensor]]:
        """Look at the bytes as they are."""
        yield [torch.frombuffer(view, dtype=dtype) for view, dtype in zip(views, dtypes, strict=True)]

    def write(self, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append at once."""
        self._shard.append(values, dtype)
        # float16 may overflow where float32 does not.
        total = (values.to(dtype) if dtype is torch.float16 else values).sum(dtype=torch.float32)
        self._note(name, float(total))

    def flush(self) -> None:
        """Nothing waits."""
