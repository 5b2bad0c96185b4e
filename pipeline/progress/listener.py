"""The seam between a merge and whoever watches it."""

from __future__ import annotations

from raymerge.cluster.runner import Progress
from raymerge.pipeline.errors import HeldError
from raymerge.pipeline.plan.types import MergePlan, ShardResult, ShardTask


class Listener:
    """Is told how a merge goes; override what is of interest."""

    def planned(self, plan: MergePlan) -> None:
        """The plan is made; nothing is written yet."""

    def held(self, error: HeldError) -> None:
        """Another run is writing to the output, and is waited for."""

    def resumed(self, tasks: list[ShardTask]) -> None:
        """An earlier run has done these tasks."""

    def progressed(self, progress: Progress) -> None:
        """Some bytes were read and written."""

    def finished(self, result: ShardResult) -> None:
        """A shard is finished."""

    def retried(self, reason: str, count: int) -> None:
        """Something went wrong so many times and was done again: with a worker just now, or on the way to a shard."""
