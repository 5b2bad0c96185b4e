"""Windows on the CPU, which works where the bytes are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.stage import Stage, unify_nans
from raymerge.pipeline.stores.files import aligned


class HostStage(Stage):
    """Nothing is moved, and results are appended at once."""

    piece_nbytes = 0

    @contextmanager
    def bring(self, filled: Filled) -> Iterator[list[list[torch.Tensor]]]:
        """Use the bytes where they are."""
        yield [[_as_tensor(view) for view in views] for views in filled.views]

    def make_scratch(self, nbytes: int) -> torch.Tensor:
        """Return scratch of a core."""
        return torch.empty(aligned(nbytes), dtype=torch.uint8)  # so that all of it can be seen in any dtype

    def write(self, output: int, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append at once."""
        if not dtype.is_floating_point:
            self._shards[output].append(values, dtype)
            return
        squares = float(torch.dot(values, values))
        if not math.isfinite(squares):
            values = unify_nans(values.to(dtype, copy=True))
        self._shards[output].append(values, dtype)
        self._note(output, name, squares, values, dtype)

    def flush(self) -> None:
        """Nothing waits."""


def _as_tensor(view: memoryview) -> torch.Tensor:
    return torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
