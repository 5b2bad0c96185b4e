"""The public API: one merge, from the config to the finished model, and its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymerge.cluster.runner import Progress, Resources
from raymerge.pipeline.checkpoint.checkpoint import CONFIG, INDEX, Checkpoint, resolve_models
from raymerge.pipeline.checkpoint.model_config import dump_config
from raymerge.pipeline.collector import pause_collector
from raymerge.pipeline.config.merge_config import MergeConfig, load_config
from raymerge.pipeline.engine.gpus import list_gpus, require_gpus
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.output.state import (
    OutputState,
    check_apart,
    check_state,
    locate_output,
    measure_nbytes,
    open_output,
    read_manifest,
)
from raymerge.pipeline.plan.memory import Transfer
from raymerge.pipeline.plan.recipe import expand
from raymerge.pipeline.plan.schedule import explain_idle, measure_cost
from raymerge.pipeline.plan.shards import Limits, make_fingerprint, make_tasks
from raymerge.pipeline.plan.types import Gpus, InputModel, MergePlan, MergeReport, ShardTask
from raymerge.pipeline.progress.listener import Listener
from raymerge.pipeline.progress.report import make_report
from raymerge.pipeline.runners import (
    check_reach,
    count_slots,
    list_cluster_variables,
    make_runner,
    prepare_workers,
    run_shard,
)
from raymerge.pipeline.sizes import DEFAULT_MEMORY, parse_nbytes
from raymerge.pipeline.stores.open import Library, Stores, StoreSettings, open_stores
from raymerge.pipeline.stores.seam import Lock, Storage

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession

Config = Path | str | Mapping[str, Any]
"""A YAML file or its name, YAML text, or its content."""


def plan(
    config: Config,
    *,
    memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
    seed: int = 0,
    gpu_memory: str | int | None = None,
    strict: bool = False,
    storage: Library = "auto",
    out: str | Path | None = None,
) -> MergePlan:
    """Work out everything that a merge will do, reading headers only.

    Args:
        config: a mergekit YAML file, its text, or its content.
        memory: for tensors and scratch of all threads together: bytes, or text such as `4GiB`.
        threads: shards in work at once; by default one for each core.
        shard_size: largest output file: bytes, or text such as `5GB`; by default it follows from the output's size.
        seed: for methods that draw random numbers.
        gpu_memory: of each GPU, to merge on GPUs: bytes, or text such as `16GiB`; by default the CPU merges.
        strict: whether doubtful settings are errors instead of warnings.
        storage: what serves object stores and the web: the fastest library for each, or `fsspec` for all.
        out: where the output will go, as a path or URL; it decides how much memory writing takes. A local directory by
            default.

    Raises:
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    limits = _make_limits(memory, threads, shard_size, seed)
    if gpu_memory is not None:  # on a machine without GPUs: a plan for one with one
        limits = replace(limits, gpus=Gpus(len(list_gpus()) or 1, _nbytes("gpu_memory", gpu_memory)))
    with open_stores(StoreSettings(storage)) as stores:
        return _plan(stores, load_config(config, strict=strict), limits, seed, "." if out is None else str(out))


def merge(
    config: Config,
    out: str | Path,
    *,
    memory: str | int = DEFAULT_MEMORY,
    threads: int | None = None,
    shard_size: str | int | None = None,
    seed: int = 0,
    gpu_memory: str | int | None = None,
    strict: bool = False,
    storage: Library = "auto",
    private: bool = True,
    wait: bool = False,
    overwrite: bool = False,
    ray: bool = False,
    address: str | None = None,
    shared_filesystem: bool = False,
    listener: Listener | None = None,
) -> MergeReport:
    """Merge models, or finish an earlier run of the same merge.

    Args:
        config: a mergekit YAML file, its text, or its content.
        out: the output directory, as a path or URL.
        memory: for tensors and scratch of all threads together: bytes, or text such as `4GiB`.
        threads: shards in work at once; by default one for each core.
        shard_size: largest output file: bytes, or text such as `5GB`; by default it follows from the output's size.
        seed: for methods that draw random numbers.
        gpu_memory: of each GPU, to merge on GPUs: bytes, or text such as `16GiB`; by default the CPU merges.
        strict: whether doubtful settings, and NaN or infinity in the output, are errors instead of warnings.
        storage: what serves object stores and the web: the fastest library for each, or `fsspec` for all.
        private: whether a repository that is made on the Hub is private.
        wait: whether to wait for another run that is writing to `out`, instead of ending with an error.
        overwrite: whether a model that is in `out` may be replaced.
        ray: whether to start Ray on this machine and have it do the work.
        address: of a running Ray cluster that does the work, as in `10.0.0.5:6379`, or `auto` for the one that this
            machine is part of; `memory` and `threads` are then for
            each of its machines.
        shared_filesystem: whether paths mean the same files on every machine of that cluster.
        listener: told how it goes, in the caller's thread.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    from raymerge.pipeline.output.stitch import list_outputs

    start = time.perf_counter()
    listener = listener or Listener()
    limits = _make_limits(memory, threads, shard_size, seed)
    if ray and address is not None:
        raise ConfigError("both ray, which starts Ray here, and the address of a running cluster are given; leave one")
    if shared_filesystem and address is None:
        raise ConfigError("shared_filesystem says something about the machines of a cluster; give its address too")
    with open_stores(StoreSettings(storage, private)) as stores, ExitStack() as stack:
        session: RaySession | None = None
        merge_config = load_config(config, strict=strict)
        if address is not None:
            from raymerge.cluster.ray.session import connect_ray

            session = stack.enter_context(connect_ray(address, list_cluster_variables()))
            if gpu_memory is not None:
                session = session.with_gpus()
            limits = replace(limits, num_threads=threads or max(node.num_cpus for node in session.nodes))
        elif limits.num_threads > 1 and not ray:
            models = [model.path for model in merge_config.referenced_models]
            prepare_workers(stores, models, str(out), on_gpus=gpu_memory is not None)
        if gpu_memory is not None:
            num_gpus = max(node.num_gpus for node in session.nodes) if session else len(require_gpus())
            limits = replace(limits, gpus=Gpus(num_gpus, _nbytes("gpu_memory", gpu_memory)))
        the_plan = _plan(stores, merge_config, limits, seed, str(out), session)
        target = _check_output(stores, the_plan, out, overwrite=overwrite)
        if ray:
            from raymerge.cluster.ray.session import start_ray

            session = stack.enter_context(start_ray(the_plan.num_threads))
            if the_plan.gpus is not None:
                session = session.with_gpus()
        if session is not None:
            urls = [target, *(item.url for item in the_plan.inputs)]
            check_reach(stores, urls, session, shared_filesystem=shared_filesystem)
        listener.planned(the_plan)
        outputs = list_outputs(the_plan)
        on_held = listener.held if wait else None
        with open_output(stores, target, the_plan.fingerprint, outputs, overwrite=overwrite, on_held=on_held) as (
            state,
            lock,
        ):
            if state is OutputState.COMPLETE:
                nonfinite = read_manifest(stores, target).nonfinite
                _check_finite(nonfinite, strict=strict)
                return make_report(
                    the_plan,
                    target,
                    seconds=time.perf_counter() - start,
                    faults=stores.faults.drain(),
                    nonfinite=nonfinite,
                    was_complete=True,
                )
            return _carry_out(stores, the_plan, target, lock, listener, start, session, strict=strict)


def check_output(plan: MergePlan, out: str | Path, *, overwrite: bool = False, storage: Library = "auto") -> str:
    """Make sure that a plan can be carried out in a directory, without writing anything; return its absolute URL.

    Raises:
        RaymergeError: it overlaps with an input, holds something else, or has no room.
    """
    with open_stores(StoreSettings(storage)) as stores:
        return _check_output(stores, plan, out, overwrite=overwrite)


def _check_output(stores: Stores, plan: MergePlan, out: str | Path, *, overwrite: bool) -> str:
    target = locate_output(stores, out)
    check_apart(stores, target, plan.inputs)
    check_state(stores, target, plan.fingerprint, overwrite=overwrite)
    needed = sum(task.nbytes for task in plan.tasks) + sum(file.nbytes for _, file in plan.side_files)
    stores.at(target).check_space(target, needed - measure_nbytes(stores, target))
    return target


@pause_collector()
def _plan(
    stores: Stores, config: MergeConfig, limits: Limits, seed: int, out: str, session: RaySession | None = None
) -> MergePlan:
    from raymerge.pipeline.checkpoint.table import (  # pyarrow: not at the start of every command
        build_index,
        stored_tensors,
    )

    checkpoints = resolve_models(stores, config.referenced_models)
    recipe = expand(config, checkpoints, stored_tensors(build_index(stores, checkpoints)))
    transfer = _measure_transfer([stores.at(c.url) for c in checkpoints], stores.at(out))
    tasks, num_threads, num_allowed = make_tasks(recipe.merges, seed, replace(limits, transfer=transfer))
    config_json = dump_config(recipe.config)
    side_files = checkpoints[0].side_files
    advice = explain_idle(tasks, count_slots(num_allowed, session, limits.gpus))
    return MergePlan(
        tasks=tasks,
        donor=checkpoints[0].model,
        config_json=config_json,
        side_files=side_files,
        inputs=tuple(InputModel(c.model, c.url, _names(c)) for c in checkpoints),
        method=config.method,
        config_text=config.text,
        seed=seed,
        warnings=(*config.warnings, *recipe.warnings),
        advice=(advice,) if advice else (),
        dropped=(*recipe.dropped, *_other_weights(checkpoints)),
        num_threads=num_threads,
        allowed_mem=limits.allowed_mem,
        gpus=limits.gpus,
        total_nbytes=sum(merge.nbytes for merge in recipe.merges),
        fingerprint=make_fingerprint(tasks, side_files, config_json),
    )


def _carry_out(
    stores: Stores,
    plan: MergePlan,
    out: str,
    lock: Lock,
    listener: Listener,
    start: float,
    session: RaySession | None,
    *,
    strict: bool,
) -> MergeReport:
    from raymerge.pipeline.output.stitch import find_nonfinite, stitch
    from raymerge.pipeline.output.verify import check_shard

    journal = Journal(stores, out, plan.fingerprint, lock.token)

    def progressed(progress: Progress) -> None:
        lock.check()
        listener.progressed(progress)

    def retried(reason: str) -> None:
        listener.retried(stores.faults.note("ray", "shard", reason), 1)

    urls = [out, *(item.url for item in plan.inputs)]
    runner = make_runner(stores, plan.num_threads, urls, session, plan.gpus, retried)
    recorded = journal.read_records(plan.tasks)
    resumed = [
        result
        for result, is_sound in runner.run(
            partial(check_shard, stores, out=out),
            recorded,
            [Resources(mem_nbytes=0, cost=result.nbytes) for result in recorded],
            lambda progress: None,
        )
        if is_sound
    ]
    listener.resumed(resumed)
    kept = {result.file for result in resumed}
    todo = [task for task in plan.tasks if task.file not in kept]
    results = []
    work_start = time.perf_counter()
    for result in runner.run(
        partial(run_shard, stores, journal=journal),
        todo,
        [_resources(task) for task in todo],
        progressed,
    ):
        for reason, count in result.faults:
            listener.retried(reason, count)
        listener.finished(result)
        results.append(result)
        lock.check()
    work_seconds = time.perf_counter() - work_start
    nonfinite = find_nonfinite([*resumed, *results])
    _check_finite(nonfinite, strict=strict)
    lock.check()
    stitch(plan, [*resumed, *results], journal)
    return make_report(
        plan,
        out,
        results,
        seconds=time.perf_counter() - start,
        work_seconds=work_seconds,
        num_per_process=runner.num_per_process,
        faults=stores.faults.drain(),
        nonfinite=nonfinite,
    )


def _check_finite(nonfinite: Sequence[str], *, strict: bool) -> None:
    if nonfinite and strict:
        raise OutputError(
            f"NaN or infinite values in {listing(nonfinite)}, refused because of strict; look for them in the inputs,"
            " choose a dtype with a larger range (bfloat16, float32) or other parameters,"
            " or leave strict out to keep them"
        )


def _measure_transfer(inputs: Sequence[Storage], output: Storage) -> Transfer:
    return Transfer(
        num_buffers=2 if any(storage.is_remote for storage in inputs) else 1,
        nbytes=sum(storage.read_nbytes for storage in dict.fromkeys(inputs)) + output.write_nbytes,
    )


def _names(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return every file of a checkpoint, relative to it."""
    weights = (file.url.removeprefix(f"{checkpoint.url}/") for file in checkpoint.weight_files)
    index = () if checkpoint.weight_map is None else (INDEX,)
    return (CONFIG, *index, *weights, *checkpoint.other_weights, *(name for name, _ in checkpoint.side_files))


def _other_weights(checkpoints: Sequence[Checkpoint]) -> list[str]:
    return [
        f"{c.model}: {name}: weights that are not part of the checkpoint; neither merged nor copied"
        for c in checkpoints
        for name in c.other_weights
    ]


def _resources(task: ShardTask) -> Resources:
    return Resources(mem_nbytes=task.projected_mem, cost=measure_cost(task))


def _make_limits(memory: str | int, threads: int | None, shard_size: str | int | None, seed: int) -> Limits:
    if seed < 0:
        raise ConfigError(f"seed is {seed}; it must be 0 or more")
    if threads is not None and threads < 1:
        raise ConfigError(f"threads is {threads}; it must be 1 or more")
    return Limits(
        allowed_mem=_nbytes("memory", memory),
        num_threads=threads or _num_cores(),
        shard_nbytes=None if shard_size is None else _nbytes("shard_size", shard_size),
    )


def _nbytes(name: str, size: str | int) -> int:
    if isinstance(size, str):
        return parse_nbytes(size)
    if size < 1:
        raise ConfigError(f"{name} is {size}; it must be 1 byte or more")
    return size


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
