"""Several outputs of one plan: merges that differ in parameters alone, made of one reading of the inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import MergePlan, ShardTask, TensorMerge


class VariantsDifferError(TensorMismatchError):
    """Merges differ in more than parameters, and need plans of their own."""


def join_variants(outputs: Sequence[tuple[TensorMerge, ...]]) -> tuple[TensorMerge, ...]:
    """Return the output tensors of several merges, each to be made for all of them at once.

    Args:
        outputs: the tensors of each.

    Raises:
        VariantsDifferError: two of them do not make the same tensors of the same sources.
    """
    first, *others = outputs
    if not others:
        return first
    for merges in others:
        if [merge.name for merge in merges] != [merge.name for merge in first]:
            raise VariantsDifferError("the variants of one plan make different tensors; they may differ in parameters")
    return tuple(_join(merges) for merges in zip(*outputs, strict=True))


def select_outputs(plan: MergePlan, positions: Sequence[int]) -> MergePlan:
    """Return a plan for some of the outputs only, in the memory that was planned for all."""
    if len(positions) == len(plan.outputs):
        return plan
    renumbered = tuple(range(len(positions)))
    tasks = [replace(select_task(task, positions), positions=renumbered) for task in plan.tasks]
    return replace(plan, tasks=tuple(tasks), outputs=tuple(plan.outputs[k] for k in positions))


def select_task(task: ShardTask, positions: Sequence[int]) -> ShardTask:
    """Return a task for some of the plan's outputs only, in the memory that was planned for all."""
    merges = [replace(merge, variants=tuple(merge.variants[k] for k in positions)) for merge in task.merges]
    outputs = tuple(task.outputs[k] for k in positions)
    return replace(task, outputs=outputs, positions=tuple(positions), merges=tuple(merges))


def select_files(
    results: Sequence[ShardResult], positions: Mapping[str, Sequence[int]], position: int
) -> list[ShardResult]:
    """Return the results of one output, with its files alone; the inputs were read for all of them.

    Args:
        results: of some tasks.
        positions: of the outputs that each of them wrote to, by the shard's name.
        position: of the output in the plan.
    """
    own = []
    for result in results:
        if position in positions[result.file]:
            file = result.files[positions[result.file].index(position)]
            own.append(replace(result, nbytes=file.nbytes, files=(file,)))
    return own


def can_join(plan: MergePlan, other: MergePlan) -> bool:
    """Tell whether two plans make the same tensors of the same sources, block by block alike."""
    merges, others = ([merge for task in each.tasks for merge in task.merges] for each in (plan, other))
    try:
        for pair in zip(merges, others, strict=True):
            _join(pair)
    except (ValueError, VariantsDifferError):
        return False
    return True


def _join(merges: Sequence[TensorMerge]) -> TensorMerge:
    first = merges[0]
    variants = tuple(variant for merge in merges for variant in merge.variants)
    grids = {variant.kernel.grid(first.site(variant)) for variant in variants}
    dtypes = {variant.kernel.compute_dtype for variant in variants}
    for merge in merges[1:]:
        if replace(merge, variants=first.variants) != first or len(grids) > 1 or len(dtypes) > 1:
            raise VariantsDifferError(
                f"{first.name}: not all variants of the plan make this tensor in one way; they may differ in"
                " parameters, and not in sources, shape, dtype or the kernel's grid"
            )
    return replace(first, variants=variants)
