"""Windows on the CPU, which works where the bytes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from raymerge.pipeline.engine.stage import Stage


class HostStage(Stage):
    """Nothing is moved, and results are appended at once."""

    device = torch.device("cpu")
    takes_windows = False

    @contextmanager
    def bring(self, views: Sequence[memoryview]) -> Iterator[list[torch.Tensor]]:
        """Use the bytes where they are."""
        yield [
            torch.frombuffer(view, dtype=torch.uint8) if len(view) else torch.empty(0, dtype=torch.uint8)
            for view in views
        ]

    def write(self, output: int, name: str, values: torch.Tensor, dtype: torch.dtype) -> None:
        """Append at once."""
        self._shards[output].append(values, dtype)
        if dtype.is_floating_point:
            self.tallies[output].add(name, float(torch.dot(values, values)), values, dtype)

    def flush(self) -> None:
        """Nothing waits."""
