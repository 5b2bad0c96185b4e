"""Carries out a plan: the shards on their runner, then what makes models of them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from raymerge.cluster.runner import Progress, Resources, Runner
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.output.stitch import check_shards, copy_side_files, find_nonfinite, stitch
from raymerge.pipeline.output.verify import check_shard
from raymerge.pipeline.plan.results import ShardFile, ShardResult
from raymerge.pipeline.plan.schedule import measure_cost
from raymerge.pipeline.plan.types import MergePlan, ShardTask
from raymerge.pipeline.plan.variants import select_task
from raymerge.pipeline.progress.narrator import Narrator
from raymerge.pipeline.runners import make_runner, run_shard
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Lock

if TYPE_CHECKING:
    from raymerge.cluster.process_runner import ProcessRunner
    from raymerge.cluster.ray.session import RaySession


@dataclass(frozen=True, slots=True)
class Execution:
    """The result of a plan."""

    results: tuple[ShardResult, ...] = ()
    """Results of the tasks that this run did."""
    positions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Numbers of the outputs that each of them wrote to, by the shard's name."""
    seconds: float = 0.0
    """In which shards were made."""
    num_per_process: int = 1
    """Shards in work at once in one process."""
    nonfinite: tuple[tuple[str, ...], ...] = ()
    """For each output its tensors with NaN or infinity."""


def carry_out(
    stores: Stores,
    plan: MergePlan,
    outs: Sequence[str],
    locks: Sequence[Lock],
    narrator: Narrator,
    session: RaySession | None,
    hired: ProcessRunner | None,
    *,
    strict: bool,
    recheck: bool,
) -> Execution:
    """Make every shard that an earlier run has not finished, and complete the outputs.

    Args:
        stores: of inputs and outputs.
        plan: what to do.
        outs: the output directories, in the plan's order.
        locks: held on them.
        narrator: told how it goes.
        session: the Ray cluster that does the work, if any.
        hired: the processes that do it, if they have been started.
        strict: whether NaN and infinity are refused.
        recheck: whether finished shards are read and hashed again.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    journals = [
        Journal(stores, out, output.fingerprint, lock.token)
        for out, output, lock in zip(outs, plan.outputs, locks, strict=True)
    ]

    def check_locks() -> None:
        for lock in locks:
            lock.check()

    def progressed(progress: Progress) -> None:
        check_locks()
        narrator.progressed(progress)

    def retried(reason: str) -> None:
        narrator.retried(stores.faults.note("workers" if session is None else "ray", "shard", reason), 1)

    urls = [*outs, *(item.url for item in plan.directories)]
    merges = (merge for task in plan.tasks for merge in task.merges)
    runner = make_runner(stores, plan.num_workers, urls, session, plan.gpus, retried, hired, merges)
    finished = _find_finished(stores, plan, journals, runner, recheck=recheck)
    todo, partly = [], []
    for task in plan.tasks:
        missing = [k for k in task.positions if (k, task.file) not in finished]
        if len(missing) == len(task.positions):
            todo.append(task)
        elif missing:
            todo.append(select_task(task, missing))
            partly.append(select_task(task, [k for k in task.positions if k not in missing]))
    positions = {task.file: task.positions for task in todo}
    narrator.resumed([task for task in plan.tasks if task.file not in positions], partly)
    results = []
    start = time.perf_counter()
    work = partial(run_shard, stores, journals=journals)
    for result in runner.run(work, todo, [_measure_resources(task) for task in todo], progressed):
        for reason, count in result.faults:
            narrator.retried(reason, count)
        narrator.finished(result)
        results.append(result)
        finished |= {(k, file.file): file for k, file in zip(positions[result.file], result.files, strict=True)}
        check_locks()
    seconds = time.perf_counter() - start
    shards = [[finished[k, task.file] for task in plan.tasks] for k in range(len(journals))]
    nonfinite = tuple(find_nonfinite(files) for files in shards)
    for names in nonfinite:
        check_finite(names, strict=strict)
    check_locks()
    for journal, files in zip(journals, shards, strict=True):
        check_shards(plan, files, journal)
    copied = copy_side_files(plan, journals)
    for journal, output, files, beside in zip(journals, plan.outputs, shards, copied, strict=True):
        stitch(plan, output, files, journal, beside)
    return Execution(tuple(results), positions, seconds, runner.num_per_process, nonfinite)


def check_finite(nonfinite: Sequence[str], *, strict: bool) -> None:
    """Refuse NaN and infinity if that is wanted.

    Raises:
        OutputError: naming some of the tensors.
    """
    if nonfinite and strict:
        raise OutputError(
            f"NaN or infinite values in {listing(nonfinite, 5)}, refused because of strict; look for them in the"
            " inputs, choose a dtype with a larger range (bfloat16, float32) or other parameters, or leave strict out"
            " to keep them"
        )


def _find_finished(
    stores: Stores, plan: MergePlan, journals: Sequence[Journal], runner: Runner, *, recheck: bool
) -> dict[tuple[int, str], ShardFile]:
    """Return the shards that an earlier run has finished, and that are as it left them, by output and name."""
    recorded = [
        (position, file)
        for position, journal in enumerate(journals)
        for file in journal.read_records(task.outputs[position] for task in plan.tasks).values()
    ]
    checks = runner.run(
        partial(check_shard, stores, outs=[journal.out for journal in journals], recheck=recheck),
        recorded,
        [Resources(mem_nbytes=0, cost=file.nbytes) for _, file in recorded],
        lambda progress: None,
    )
    return {(position, file.file): file for position, file in filter(None, checks)}


def _measure_resources(task: ShardTask) -> Resources:
    return Resources(mem_nbytes=task.projected_mem, cost=measure_cost(task), num_slots=task.num_shares)
