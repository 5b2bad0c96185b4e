"""Workers of merges, and the limits of each of their machines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.cluster.host import measure_memory
from raymerge.cluster.ray.session import RESERVED_MEM, TASK_NBYTES
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.engine.gpu.devices import list_gpus, require_gpus
from raymerge.pipeline.engine.readiness import start_compiling
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.plan.foresight import guess_kernels
from raymerge.pipeline.plan.memory.gpu import WORKERS_PER_GPU
from raymerge.pipeline.plan.memory.shares import Limits
from raymerge.pipeline.plan.types import Gpus, MergePlan
from raymerge.pipeline.runners import check_reach, list_cluster_variables, prepare_workers
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from raymerge.cluster.process_runner import ProcessRunner
    from raymerge.cluster.ray.session import RaySession


@dataclass(frozen=True, slots=True)
class Workers:
    """The workers of one or more merges."""

    limits: Limits
    """Limits of each machine."""
    session: RaySession | None = None
    """The Ray cluster that does it, if any."""
    hired: ProcessRunner | None = None
    """Processes of this machine that have been started already."""


def find_workers(
    stores: Stores, configs: Sequence[MergeConfig], outs: Sequence[str | Path], options: MergeOptions, stack: ExitStack
) -> Workers:
    """Return the running Ray cluster that is asked for, if any, what each machine may use, and started processes.

    Where processes of this machine will do the work, they begin to import and compile what they need.

    Args:
        stores: of inputs and outputs.
        configs: of the merges.
        outs: paths or URLs of their outputs.
        options: how to merge.
        stack: ends what is begun here.
    """
    session: RaySession | None = None
    hired: ProcessRunner | None = None
    limits = make_limits(options)
    gpu_mem = options.allowed_gpu_mem
    if options.address is not None:
        from raymerge.cluster.ray.session import connect_ray

        session = stack.enter_context(connect_ray(options.address, list_cluster_variables()))
        if gpu_mem is not None:
            session = session.with_gpus()
        num_workers = options.workers or max(node.num_cpus for node in session.nodes)
        task_mem = max(node.mem_nbytes for node in session.nodes) - RESERVED_MEM
        limits = replace(limits, num_workers=num_workers, task_mem=max(1, task_mem))
    elif limits.num_workers > 1 and not options.ray:
        inputs = (model for config in configs for model in (*config.input_models, *config.statistics_places))
        parts = (part for model in inputs for part in (model, model.adapter))
        models = [*dict.fromkeys(part.path for part in filter(None, parts))]
        hired = prepare_workers(
            stores, models, [str(out) for out in outs], limits.num_workers, on_gpus=gpu_mem is not None
        )
        if hired is not None:
            stack.callback(hired.close)
    if gpu_mem is not None:
        num_gpus = max(node.num_gpus for node in session.nodes) if session else len(require_gpus())
        limits = _use_gpus(limits, num_gpus, gpu_mem, options)
    if limits.gpus is None and options.address is None:  # loops will run here
        kernels = (kernel for config in configs for kernel in guess_kernels(config))
        compiling = start_compiling(kernels, has_variants=len(configs) > 1)
        if compiling is not None:
            stack.callback(compiling.close)
    return Workers(limits, session, hired)


def start_workers(
    stores: Stores,
    workers: Workers,
    plans: Sequence[MergePlan],
    urls: Sequence[str],
    options: MergeOptions,
    stack: ExitStack,
) -> Workers:
    """Return workers that can begin, with Ray started if that is asked for.

    Args:
        stores: of inputs and outputs.
        workers: as found before planning.
        plans: what is to be done.
        urls: of the outputs.
        options: how to merge.
        stack: ends what is begun here.

    Raises:
        ConfigError: workers on other machines would not find what they are to read and write.
    """
    session = workers.session
    if options.ray:
        from raymerge.cluster.ray.session import start_ray

        session = stack.enter_context(start_ray(max(plan.num_workers for plan in plans)))
        if workers.limits.gpus is not None:
            session = session.with_gpus()
    if session is not None:
        for plan in plans:
            reached = [*urls, *(item.url for item in plan.directories)]
            check_reach(stores, reached, session, shared_filesystem=options.shared_filesystem)
    return replace(workers, session=session)


def make_limits(options: MergeOptions) -> Limits:
    """Return what a machine may use, where it merges on the CPU."""
    return Limits(
        options.allowed_mem,
        options.num_workers,
        options.shard_nbytes,
        runner_nbytes=TASK_NBYTES if _is_on_ray(options) else 0,
        task_mem=measure_memory() // 2 if options.ray else None,  # Ray keeps some for itself and its object store
    )


def make_local_limits(options: MergeOptions) -> Limits:
    """Return what this machine may use; to plan for GPUs, it need not have any."""
    limits = make_limits(options)
    gpu_mem = options.allowed_gpu_mem
    return limits if gpu_mem is None else _use_gpus(limits, len(list_gpus()) or 1, gpu_mem, options)


def _use_gpus(limits: Limits, num_gpus: int, gpu_mem: int, options: MergeOptions) -> Limits:
    """Return limits for merging on GPUs, with no more workers than a GPU is fast with unless the user wants them."""
    num_workers = limits.num_workers if options.workers else min(limits.num_workers, num_gpus * WORKERS_PER_GPU)
    return replace(limits, num_workers=num_workers, gpus=Gpus(num_gpus, gpu_mem, not _is_on_ray(options)))


def _is_on_ray(options: MergeOptions) -> bool:
    return options.ray or options.address is not None
