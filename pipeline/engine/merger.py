"""Merges windows on the CPU: by compiled loops, and by torch where there are none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from raymerge.ops.stored import RunAll
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.loop_merger import LoopMerger
from raymerge.pipeline.engine.readiness import takes_loops
from raymerge.pipeline.engine.runs import Figures
from raymerge.pipeline.engine.tally import Tally
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.plan.types import TensorMerge

if TYPE_CHECKING:
    from raymerge.pipeline.engine.torch_merger import TorchMerger


class HostMerger:
    """Merges one task on the CPU, window by window: `add` for each, in order, and `flush` at the end."""

    def __init__(
        self,
        shards: Sequence[ShardWriter],
        tallies: Sequence[Tally],
        figures: Sequence[Figures],
        run_all: RunAll,
        make_torch_merger: Callable[[], TorchMerger],
    ) -> None:
        """Write to one shard for each output.

        Args:
            shards: in the order of the task's outputs.
            tallies: of the shards.
            figures: of the shards.
            run_all: runs the pieces that loops merge.
            make_torch_merger: called for the first tensor that needs torch.
        """
        self._loops = LoopMerger(shards, tallies, figures, run_all)
        self._make_torch_merger = make_torch_merger
        self._torch: TorchMerger | None = None
        self._tensor: TensorMerge | None = None
        """The tensor of the last window."""
        self._takes_loops = False
        """Whether loops merge it."""

    def add(self, filled: Filled) -> None:
        """Work off one window.

        Raises:
            TensorMismatchError: tensors that are copied differ between the inputs.
        """
        merge = filled.window.merge
        if merge is not self._tensor:
            self._tensor, self._takes_loops = merge, takes_loops(merge)
        if self._takes_loops:
            self._loops.add(filled)
            return
        if self._torch is None:
            self._torch = self._make_torch_merger()
        self._torch.add(filled)

    def flush(self) -> None:
        """Append what torch still has."""
        if self._torch is not None:
            self._torch.flush()
