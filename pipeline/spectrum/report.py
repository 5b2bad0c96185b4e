"""A sweep's plan as text."""

from __future__ import annotations

from raymerge.pipeline.messages import counted, listing, shown
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_memory, format_nbytes
from raymerge.pipeline.spectrum.batches import Batch
from raymerge.pipeline.spectrum.plan import SweepPlan

_SHOWN = 12
"""Points that a plan names unless it is verbose."""


def format_sweep(plan: SweepPlan, *, makes_models: bool = True, verbose: bool = False) -> str:
    """Return a plan as text.

    Args:
        plan: what is to be done.
        makes_models: whether the models are made, or the points only recorded.
        verbose: whether all points and their settings are listed.
    """
    points = plan.recipe.points
    names = [point.name for point in points]
    equal = (
        f", {counted(len(points) - plan.num_models, 'point')} equal to others" if plan.num_models < len(points) else ""
    )
    times = "once" if len(plan.batches) == 1 else f"{len(plan.batches)} times"
    batches = plan.batches if makes_models else ()
    lines = [
        f"sweep of {', '.join(plan.recipe.paths)}: {counted(len(points), 'point')}{equal}",
        f"  points   {listing(names, len(names) if verbose else _SHOWN)}",
    ]
    lines += _list_equal(plan, verbose=verbose)
    if makes_models:
        lines += [
            f"  read     {format_nbytes(plan.read_nbytes)}: the inputs {times}",
            f"  write    {format_nbytes(plan.write_nbytes)} in {counted(plan.num_models, 'model')}",
        ]
    else:
        most = max((batch.write_nbytes // len(batch.points) for batch in plan.batches), default=0)
        reads = max((sum(task.read_nbytes for task in batch.plan.tasks) for batch in plan.batches), default=0)
        lines.append(
            f"  models   none are made now: `raymerge eval` makes one at a time, of up to {format_nbytes(most)},"
            f" reads up to {format_nbytes(reads)} for it, and deletes it"
        )
    if len(batches) == 1:
        lines += _describe(batches[0])
    for number, batch in enumerate(batches, start=1):
        if len(batches) > 1:
            lines.append(f"  batch {number}: {listing([point.name for point in batch.points], _SHOWN)}")
            lines += [f"  {line}" for line in _describe(batch)]
    if verbose:
        lines += [
            f"  {point.name}: {', '.join(f'{path} {shown(value)}' for path, value in point.settings.items())}"
            for point in points
        ]
    return redact("\n".join(lines))


def _list_equal(plan: SweepPlan, *, verbose: bool) -> list[str]:
    """Return a line for each point that is the same model as one before it, of this sweep or an earlier one."""
    owners: dict[str, str] = {}
    for point in plan.spectrum.points:
        owners.setdefault(point.url, point.name)
    urls = {point.name: point.url for point in plan.spectrum.points}
    names = [point.name for point in plan.recipe.points if owners[urls[point.name]] != point.name]
    lines = [f"  equal    {name} is the same model as {owners[urls[name]]}" for name in names]
    return lines if verbose or len(lines) <= _SHOWN else [*lines[:_SHOWN], f"  equal    and {len(lines) - _SHOWN} more"]


def _describe(batch: Batch) -> list[str]:
    plan = batch.plan
    most = max(task.projected_mem for task in plan.tasks)
    reread = sum(task.reread_nbytes for task in plan.tasks)
    again = f", {format_nbytes(reread)} of it again between passes" if reread else ""
    return [
        f"  {plan.method:<8} {counted(len(batch.points), 'model')} at once, in"
        f" {counted(len(plan.tasks), 'shard')} each; reads {format_nbytes(batch.read_nbytes)}{again}",
        f"  memory   {format_memory(most)} for each of {counted(plan.num_workers, 'worker')}, at most;"
        f" {format_memory(plan.allowed_mem)} are allowed in all",
    ]
