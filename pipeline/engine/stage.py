"""Stages: they bring a window to the processor that merges it, and the results back."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager

import torch

from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.tally import Tally
from raymerge.pipeline.engine.writer import ShardWriter

_NAN_BITS = {
    torch.bfloat16: (torch.int16, 0x7FC0),
    torch.float16: (torch.int16, 0x7E00),
    torch.float32: (torch.int32, 0x7FC00000),
    torch.float64: (torch.int64, 0x7FF8000000000000),
}


def unify_nans(values: torch.Tensor) -> torch.Tensor:
    """Give every NaN among floating-point values the same bits, which differ among processors; return the values."""
    integers, bits = _NAN_BITS[values.dtype]
    values.view(integers)[values.isnan()] = bits
    return values


class Stage(ABC):
    """Moves values. For each window: `bring`, and while it is there `write` for its pieces, in their order.

    `flush` at the end.
    """

    piece_nbytes: int
    """Bytes of the sources that are one piece for kernels: as many whole blocks, or 0 for a block at a time."""

    def __init__(self, shards: Sequence[ShardWriter], tallies: Sequence[Tally]) -> None:
        """Write to one shard for each output."""
        self._shards = shards
        self._tallies = tallies

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

    def _note(self, output: int, name: str, squares: float, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Note values, rounded or not, that were written to a shard; see `Tally.add`."""

        def look() -> tuple[float, bool]:
            rounded = values.to(dtype)
            return float(rounded.double().square().sum()), bool(rounded.isfinite().all())

        self._tallies[output].add(name, squares, str(dtype).removeprefix("torch."), look)
