"""Warnings of seeds that make no difference."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.spectrum.batches import Batch
from raymerge.pipeline.spectrum.paths import SEED
from raymerge.pipeline.spectrum.points import SweepPoint


def warn_of_equal_seeds(batches: Sequence[Batch]) -> tuple[str, ...]:
    """Return a warning of points that differ in their seeds alone, where it is sure that nothing is drawn."""
    equal: dict[str, list[SweepPoint]] = {}
    for batch in batches:
        for k, point in enumerate(batch.points):
            if not _may_draw(point.config) and not _draws(batch.plan, k):
                settings = {path: value for path, value in point.settings.items() if path != SEED}
                equal.setdefault(repr((settings, point.config.text)), []).append(point)
    groups = [points for points in equal.values() if len(points) > 1]
    if not groups:
        return ()
    listed = "; ".join(f"{listing(point.name for point in points)} get equal bytes" for points in groups[:3])
    more = f"; and so for {len(groups) - 3} more settings" if len(groups) > 3 else ""
    named = listing(dict.fromkeys(points[0].config.op.name for points in groups), separator=" and ")
    return (f"{SEED}: no random numbers are drawn here by {named}; {listed}{more}. Leave the seed out",)


def _may_draw(config: MergeConfig) -> bool:
    """Tell whether there is more than kernels of raymerge's own that draws, or may draw, random numbers."""
    return bool(config.steps or config.mixture or config.op.origin)


def _draws(plan: MergePlan, position: int) -> bool:
    return any(merge.variants[position].kernel.is_random for task in plan.tasks for merge in task.merges)
