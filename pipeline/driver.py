"""The public API: one merge, from the config to the finished model, and its parts."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from raymerge.pipeline.config.merge_config import load_config
from raymerge.pipeline.engine.gpus import list_gpus, require_gpus
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.execution import Execution, carry_out, check_finite
from raymerge.pipeline.output.state import (
    OutputState,
    check_apart,
    check_state,
    locate_output,
    measure_nbytes,
    open_output,
    read_manifest,
)
from raymerge.pipeline.output.stitch import list_outputs
from raymerge.pipeline.plan.shards import Limits
from raymerge.pipeline.plan.types import Gpus, MergePlan, MergeReport
from raymerge.pipeline.plan.variants import select_outputs
from raymerge.pipeline.planner import make_plan
from raymerge.pipeline.progress.listener import Listener
from raymerge.pipeline.progress.report import make_report
from raymerge.pipeline.runners import check_reach, list_cluster_variables, prepare_workers
from raymerge.pipeline.sizes import DEFAULT_MEMORY, parse_nbytes
from raymerge.pipeline.stores.open import Library, Stores, StoreSettings, open_stores

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
        loaded = load_config(config, strict=strict)
        return make_plan(stores, [loaded], ["." if out is None else str(out)], limits, seed)


def merge(config: Config, out: str | Path, **keywords: Any) -> MergeReport:
    """Merge models, or finish an earlier run of the same merge.

    Args:
        config: a mergekit YAML file, its text, or its content.
        out: the output directory, as a path or URL.
        **keywords: see `merge_variants`.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    return merge_variants([config], [out], **keywords)[0]


def merge_variants(
    configs: Sequence[Config],
    outs: Sequence[str | Path],
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
) -> list[MergeReport]:
    """Make several models that differ in parameters alone, reading their inputs once.

    Each output has the bytes that its own merge would give.

    Args:
        configs: one for each output: mergekit YAML files, their text, or their content.
        outs: the output directories, as paths or URLs.
        memory: for tensors and scratch of all threads together: bytes, or text such as `4GiB`.
        threads: shards in work at once; by default one for each core.
        shard_size: largest output file: bytes, or text such as `5GB`; by default it follows from the output's size.
        seed: for methods that draw random numbers.
        gpu_memory: of each GPU, to merge on GPUs: bytes, or text such as `16GiB`; by default the CPU merges.
        strict: whether doubtful settings, and NaN or infinity in the output, are errors instead of warnings.
        storage: what serves object stores and the web: the fastest library for each, or `fsspec` for all.
        private: whether a repository that is made on the Hub is private.
        wait: whether to wait for another run that is writing to an output, instead of ending with an error.
        overwrite: whether a model that is in an output may be replaced.
        ray: whether to start Ray on this machine and have it do the work.
        address: of a running Ray cluster that does the work, as in `10.0.0.5:6379`, or `auto` for the one that this
            machine is part of; `memory` and `threads` are then for each of its machines.
        shared_filesystem: whether paths mean the same files on every machine of that cluster.
        listener: told how it goes, in the caller's thread.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    start = time.perf_counter()
    listener = listener or Listener()
    limits = _make_limits(memory, threads, shard_size, seed)
    if ray and address is not None:
        raise ConfigError("both ray, which starts Ray here, and the address of a running cluster are given; leave one")
    if shared_filesystem and address is None:
        raise ConfigError("shared_filesystem says something about the machines of a cluster; give its address too")
    with open_stores(StoreSettings(storage, private)) as stores, ExitStack() as stack:
        session: RaySession | None = None
        loaded = [load_config(config, strict=strict) for config in configs]
        if address is not None:
            from raymerge.cluster.ray.session import connect_ray

            session = stack.enter_context(connect_ray(address, list_cluster_variables()))
            if gpu_memory is not None:
                session = session.with_gpus()
            limits = replace(limits, num_threads=threads or max(node.num_cpus for node in session.nodes))
        elif limits.num_threads > 1 and not ray:
            models = [model.path for model in loaded[0].referenced_models]
            prepare_workers(stores, models, [str(out) for out in outs], on_gpus=gpu_memory is not None)
        if gpu_memory is not None:
            num_gpus = max(node.num_gpus for node in session.nodes) if session else len(require_gpus())
            limits = replace(limits, gpus=Gpus(num_gpus, _nbytes("gpu_memory", gpu_memory)))
        the_plan = make_plan(stores, loaded, [str(out) for out in outs], limits, seed, session)
        targets = [_check_output(stores, the_plan, k, out, overwrite=overwrite) for k, out in enumerate(outs)]
        if ray:
            from raymerge.cluster.ray.session import start_ray

            session = stack.enter_context(start_ray(the_plan.num_threads))
            if the_plan.gpus is not None:
                session = session.with_gpus()
        if session is not None:
            urls = [*targets, *(item.url for item in the_plan.inputs)]
            check_reach(stores, urls, session, shared_filesystem=shared_filesystem)
        listener.planned(the_plan)
        names = list_outputs(the_plan)
        on_held = listener.held if wait else None
        states, locks = [], []
        for target, output in zip(targets, the_plan.outputs, strict=True):
            opened = open_output(stores, target, output.fingerprint, names, overwrite=overwrite, on_held=on_held)
            state, lock = stack.enter_context(opened)
            states.append(state)
            locks.append(lock)
        unfinished = [k for k, state in enumerate(states) if state is not OutputState.COMPLETE]
        complete = [k for k in range(len(outs)) if k not in unfinished]
        nonfinite = {k: tuple(read_manifest(stores, targets[k]).nonfinite) for k in complete}
        for found in nonfinite.values():
            check_finite(found, strict=strict)
        done: Execution | None = None
        if unfinished:
            done = carry_out(
                stores,
                select_outputs(the_plan, unfinished),
                [targets[k] for k in unfinished],
                [locks[k] for k in unfinished],
                listener,
                session,
                strict=strict,
            )
            nonfinite |= dict(zip(unfinished, done.nonfinite, strict=True))
        faults = stores.faults.drain()
        seconds = time.perf_counter() - start
        return [
            make_report(
                the_plan,
                target,
                done.results if done and k in unfinished else (),
                seconds=seconds,
                work_seconds=done.seconds if done else 0.0,
                num_per_process=done.num_per_process if done else 1,
                faults=faults,
                nonfinite=nonfinite[k],
                was_complete=k not in unfinished,
            )
            for k, target in enumerate(targets)
        ]


def check_output(plan: MergePlan, out: str | Path, *, overwrite: bool = False, storage: Library = "auto") -> str:
    """Make sure that a plan can be carried out in a directory, without writing anything; return its absolute URL.

    Raises:
        RaymergeError: it overlaps with an input, holds something else, or has no room.
    """
    with open_stores(StoreSettings(storage)) as stores:
        return _check_output(stores, plan, 0, out, overwrite=overwrite)


def _check_output(stores: Stores, plan: MergePlan, position: int, out: str | Path, *, overwrite: bool) -> str:
    target = locate_output(stores, out)
    output = plan.outputs[position]
    check_apart(stores, target, plan.inputs)
    check_state(stores, target, output.fingerprint, overwrite=overwrite)
    needed = sum(task.outputs[position].nbytes for task in plan.tasks) + sum(file.nbytes for file in output.side_files)
    stores.at(target).check_space(target, needed - measure_nbytes(stores, target))
    return target


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
