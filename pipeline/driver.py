"""The public API: one merge, from the config to the finished model, and its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Progress, Resources
from raymerge.pipeline.buffers import POOL
from raymerge.pipeline.config import load_config
from raymerge.pipeline.journal import Journal
from raymerge.pipeline.model_config import dump_config
from raymerge.pipeline.output import OutputState, check_apart, locate_output, open_output
from raymerge.pipeline.plan import Limits, make_fingerprint, make_tasks
from raymerge.pipeline.recipe import expand
from raymerge.pipeline.sizes import parse_nbytes
from raymerge.pipeline.sources import Checkpoint, resolve_models
from raymerge.pipeline.storage import storage_for
from raymerge.pipeline.types import MergePlan, MergeReport, ShardResult, ShardTask

Config = Path | str | Mapping[str, Any]
"""A YAML file, YAML text, or its content."""

DEFAULT_MEMORY = "4GiB"


class Listener:
    """Is told how a merge goes; override what is of interest."""

    def planned(self, plan: MergePlan) -> None:
        """The plan is made; nothing is written yet."""

    def resumed(self, results: list[ShardResult]) -> None:
        """These shards were finished by an earlier run."""

    def progressed(self, progress: Progress) -> None:
        """Some bytes were read and written."""

    def finished(self, result: ShardResult) -> None:
        """A shard is finished."""


def plan(
    config: Config,
    *,
    memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
    seed: int = 0,
    strict: bool = False,
) -> MergePlan:
    """Work out everything that a merge will do, reading headers only.

    Args:
        config: a mergekit YAML file, its text, or its content.
        memory: for tensors and scratch of all threads together: bytes, or text such as `4GiB`.
        threads: shards in work at once; by default one for each core.
        shard_size: largest output file: bytes, or text such as `5GB`; by default it follows from the output's size.
        seed: for methods that draw random numbers.
        strict: whether doubtful settings are errors instead of warnings.

    Raises:
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    return _plan(config, memory, threads, shard_size, seed, strict)


def merge(
    config: Config,
    out: str | Path,
    *,
    memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
    seed: int = 0,
    strict: bool = False,
    overwrite: bool = False,
    listener: Listener | None = None,
) -> MergeReport:
    """Merge models, or finish an earlier run of the same merge.

    Args:
        config: a mergekit YAML file, its text, or its content.
        out: the output directory, as a path or a file:// URL.
        memory: for tensors and scratch of all threads together: bytes, or text such as `4GiB`.
        threads: shards in work at once; by default one for each core.
        shard_size: largest output file: bytes, or text such as `5GB`; by default it follows from the output's size.
        seed: for methods that draw random numbers.
        strict: whether doubtful settings are errors instead of warnings.
        overwrite: whether a model that is in `out` may be replaced.
        listener: told how it goes, in the caller's thread.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    start = time.perf_counter()
    listener = listener or Listener()
    target = locate_output(out)
    the_plan = _plan(config, memory, threads, shard_size, seed, strict)
    check_apart(
        target, sorted({s.file.url.rpartition("/")[0] for t in the_plan.tasks for m in t.merges for s in m.sources})
    )
    listener.planned(the_plan)
    with (
        closing(storage_for(target)),
        closing(POOL),
        open_output(target, the_plan.fingerprint, overwrite=overwrite) as state,
    ):
        if state is OutputState.COMPLETE:
            return _report(the_plan, target, [], [], start)
        return _carry_out(the_plan, target, listener, start)


def _plan(
    config: Config, memory: str | int, threads: int | None, shard_size: str | int | None, seed: int, strict: bool
) -> MergePlan:
    from raymerge.pipeline.index import build_index, stored_tensors  # pyarrow: not at the start of every command

    merge_config = load_config(config, strict=strict)
    checkpoints = resolve_models(merge_config.referenced_models)
    recipe = expand(merge_config, checkpoints, stored_tensors(build_index(checkpoints)))
    limits = Limits(_nbytes(memory), threads or _num_cores(), None if shard_size is None else _nbytes(shard_size))
    tasks, num_threads = make_tasks(recipe.merges, seed, limits)
    config_json = dump_config(recipe.config)
    side_files = checkpoints[0].side_files
    return MergePlan(
        tasks=tasks,
        donor=checkpoints[0].model,
        config_json=config_json,
        side_files=side_files,
        models=merge_config.referenced_models,
        method=merge_config.method,
        config_text=merge_config.text,
        seed=seed,
        warnings=(*merge_config.warnings, *recipe.warnings),
        dropped=(*recipe.dropped, *_other_weights(checkpoints)),
        num_threads=num_threads,
        allowed_mem=limits.allowed_mem,
        total_nbytes=sum(merge.nbytes for merge in recipe.merges),
        fingerprint=make_fingerprint(tasks, side_files, (config_json, merge_config.text)),
    )


def _carry_out(plan: MergePlan, out: str, listener: Listener, start: float) -> MergeReport:
    from raymerge.pipeline.execute import run_shard  # torch: only where tensors are merged
    from raymerge.pipeline.stitch import stitch
    from raymerge.pipeline.verify import hash_shard

    journal = Journal(out, plan.fingerprint)
    runner = LocalRunner(plan.num_threads)
    recorded = journal.read_records(plan.tasks)
    resumed = [
        result
        for result, sha256 in runner.run(
            partial(hash_shard, out=out),
            recorded,
            [Resources(mem_nbytes=0, cost=result.nbytes) for result in recorded],
            lambda progress: None,
        )
        if sha256 == result.sha256
    ]
    listener.resumed(resumed)
    kept = {result.file for result in resumed}
    todo = [task for task in plan.tasks if task.file not in kept]
    results = []
    for result in runner.run(
        partial(run_shard, journal=journal), todo, [_resources(task) for task in todo], listener.progressed
    ):
        listener.finished(result)
        results.append(result)
    stitch(plan, [*resumed, *results], out)
    return _report(plan, out, resumed, results, start)


def _report(
    plan: MergePlan, out: str, resumed: list[ShardResult], results: list[ShardResult], start: float
) -> MergeReport:
    nonfinite = [name for result in (*resumed, *results) for name in result.nonfinite]
    warnings = [f"{name}: the output has NaN or infinite values" for name in nonfinite]
    return MergeReport(
        out=out,
        num_tensors=len(plan.weight_map),
        num_shards=len(plan.tasks),
        num_resumed=len(plan.tasks) - len(results),
        read_nbytes=sum(result.read_nbytes for result in results),
        written_nbytes=sum(result.nbytes for result in results),
        seconds=time.perf_counter() - start,
        peak_rss=max((result.peak_rss for result in results), default=0),
        warnings=(*plan.warnings, *warnings),
    )


def _other_weights(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [
        f"{c.model}: {name}: weights that are not part of the checkpoint; neither merged nor copied"
        for c in checkpoints
        for name in c.other_weights
    ]


def _resources(task: ShardTask) -> Resources:
    return Resources(mem_nbytes=task.projected_mem, cost=task.read_nbytes + task.reread_nbytes + task.nbytes)


def _nbytes(size: str | int) -> int:
    return parse_nbytes(size) if isinstance(size, str) else size


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
