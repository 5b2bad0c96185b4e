"""Where the values of a task are: how a window gets to the processor that merges it, and how the results come back."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cache

import torch

from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.writer import ShardWriter


class Tally:
    """Figures of the tensors that have been written to one shard."""

    def __init__(self) -> None:
        self._squares: dict[str, float] = {}
        self._nonfinite: dict[str, None] = {}

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinity among what was written."""
        return tuple(self._nonfinite)

    def add(self, name: str, squares: float, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Note some values of a tensor.

        Args:
            name: of the tensor.
            squares: the sum of their squares, in float32: overflow is told from infinity by looking at the values.
            values: flat, on the CPU, rounded or not.
            dtype: what they are rounded to in the file.
        """
        if not squares < _find_harmless(dtype):
            values = values.to(dtype)
            squares = float(values.double().square().sum())
            if not values.isfinite().all():
                self._nonfinite[name] = None
        self._squares[name] = self._squares.get(name, 0.0) + squares

    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """Return the norm of each tensor, right to about five digits."""
        return {name: {"norm": math.sqrt(total)} for name, total in self._squares.items()}


@cache
def _find_harmless(dtype: torch.dtype) -> float:
    """Return a sum of squares below which no value overflows in a dtype, nor its square in float32."""
    largest = torch.finfo(dtype).max
    return min(largest * largest, torch.finfo(torch.float32).max)  # `**` raises where the square overflows


class Stage(ABC):
    """Moves values. For each window: `bring`, and while it is there `write` for its pieces, in their order.

    `flush` at the end.
    """

    device: torch.device
    """Where tensors to work with are made."""
    piece_nbytes: int
    """How many bytes of the sources are one piece for kernels: as many whole blocks, or 0 for a block at a time."""

    def __init__(self, shards: Sequence[ShardWriter]) -> None:
        """Write to one shard for each output."""
        self._shards = shards
        self.tallies = [Tally() for _ in shards]

    @abstractmethod
    def bring(self, filled: Filled) -> AbstractContextManager[list[list[torch.Tensor]]]:
        """Have the bytes of each source on the device, as flat uint8 tensors; the window is not needed afterwards."""

    @abstractmethod
    def make_scratch(self, nbytes: int) -> torch.Tensor:
        """Return so many bytes on the device, for the pieces of all windows."""

    @abstractmethod
    def write(self, output: int, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append values of a tensor to the shard of one output, rounded to a dtype; sooner or later.

        Args:
            output: which shard.
            name: of the tensor.
            values: flat.
            dtype: of the file.
        """

    @abstractmethod
    def flush(self) -> None:
        """Append what has not been so far."""
