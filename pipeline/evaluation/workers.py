"""Workers that evaluate: processes of this machine or of a Ray cluster, and the GPUs that each model has."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.cluster.errors import ResourceError
from raymerge.cluster.host import count_cores
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Progress, Report, Resources
from raymerge.ops.own import read_own_ops
from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.engine.gpu.devices import list_gpus
from raymerge.pipeline.errors import ConfigError, FetchError, MergeError, OutputError
from raymerge.pipeline.evaluation.events import Evaluated, EvaluationEvent, Repeated
from raymerge.pipeline.evaluation.generation.engines import Engines
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.records import Records
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.units import Unit, evaluate_unit, make_failed
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.runners import check_reach, list_cluster_variables
from raymerge.pipeline.spectrum.places import load_point
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import Node

_PASSING: tuple[type[MergeError], ...] = (FetchError, OutputError)
"""Errors that may not come again on another machine: it may have no way to a store, or no credentials for it."""

Found = tuple[str, list[Evaluation]]
"""The name of a model, and what came of its tasks."""


def evaluate_here(
    stores: Stores, out: str, units: Sequence[Unit], options: EvaluateOptions, tell: Callable[[EvaluationEvent], None]
) -> Iterator[Found]:
    """Yield what comes of each model, evaluated on this machine.

    Raises:
        ConfigError: it has not the GPUs that are asked for.
    """
    gpus = share_gpus(options)
    num_workers = len(gpus) or options.workers or 1
    with Engines(options.backend, num_workers, options.timeout, gpus) as engines:
        runner = LocalRunner(min(num_workers, len(units)))
        work = partial(evaluate_unit, stores, out, merging=_merging(options), engines=engines, tell=tell)
        yield from runner.run(work, units, [Resources(mem_nbytes=0, cost=0)] * len(units), lambda progress: None)


def evaluate_on_ray(
    stores: Stores, out: str, units: Sequence[Unit], options: EvaluateOptions, tell: Callable[[EvaluationEvent], None]
) -> Iterator[Found]:
    """Yield what comes of each model, or of each of its tasks, evaluated on a Ray cluster, or on Ray started here.

    Where a worker or a machine is lost, its item is done again: finished samples are found in their files.

    Raises:
        ConfigError: machines of the cluster would not find models, or could not write results.
        ResourceError: no machine has the GPUs that are asked for.
    """
    from raymerge.cluster.ray.session import connect_ray, start_ray

    connecting = (
        start_ray(max(count_cores(), options.workers or 1))
        if options.address is None
        else connect_ray(options.address, list_cluster_variables())
    )
    with connecting as session:
        from raymerge.cluster.ray.runner import RayRunner

        urls = [out, *dict.fromkeys(url for unit in units for url in list_inputs(stores, unit, options.ops))]
        check_reach(stores, urls, session, shared_filesystem=options.shared_filesystem)
        num_gpus = options.gpus_per_model
        if num_gpus is None:
            num_gpus = float(any(node.num_gpus for node in session.nodes))
        nodes = [node for node in session.nodes if node.num_gpus >= num_gpus]
        if not nodes:
            most = max(node.num_gpus for node in session.nodes)
            raise ResourceError(
                f"--gpus-per-model {num_gpus:g}: no node of the cluster has so many GPUs; the most on one is {most}"
            )
        num_cpus = count_cpus(nodes, num_gpus, options.workers)
        items = list(split_units(units))
        is_bound = not session.is_elsewhere and any(scheme_of(url) == "file" for url in urls)

        def give_up(item: int, error: Exception) -> Found:
            unit, records = items[item], Records(stores, out)
            failed = [make_failed(unit, task, error) for task in unit.tasks]
            for evaluation, task in zip(failed, unit.tasks, strict=True):
                records.write(evaluation, task)
                tell(Evaluated(evaluation, is_cached=False))
            return unit.subject.name, failed

        runner = RayRunner(
            max(1, sum(count_slots(node, num_cpus, num_gpus) for node in nodes)),
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            host=session.host if is_bound else None,
            retry_on=_PASSING,
            on_retry=lambda reason: tell(Repeated(reason)),
            on_giving_up=give_up,
            has_twins=False,
            advice="add a larger node, or ask for fewer --gpus-per-model",
        )

        def note(progress: Progress) -> None:
            for event in progress.notes:
                tell(event)  # type: ignore[arg-type]

        work = partial(evaluate_elsewhere, stores, out, options, str(Path.cwd()))
        yield from runner.run(work, items, [Resources(mem_nbytes=0, cost=0)] * len(items), note)


def evaluate_elsewhere(
    stores: Stores, out: str, options: EvaluateOptions, directory: str, unit: Unit, report: Report
) -> Found:
    """Evaluate a model in a worker of a cluster.

    Args:
        stores: that have the models and results.
        out: where results go.
        options: of the evaluation.
        directory: from which the command line was run: relative paths of planned points and commands start there.
        unit: the model and its tasks.
        report: told of events, and now and then of nothing but being alive.

    Raises:
        ModuleNotFoundError: a library that a task needs is not installed here.
        MergeError: the model cannot be brought here, and might be elsewhere.
    """
    for library in dict.fromkeys(library for task in unit.tasks for library in task.libraries):
        if find_spec(library) is None:
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
    if Path(directory).is_dir():
        os.chdir(directory)  # this process is this run's alone
    with Engines(options.backend, 1, options.timeout) as engines:
        return evaluate_unit(
            stores,
            out,
            unit,
            report,
            merging=_merging(options),
            engines=engines,
            tell=lambda event: report(Progress(notes=(event,))),
            raised=_PASSING,
        )


def _merging(options: EvaluateOptions) -> MergeOptions:
    """Return how models are merged that are only planned."""
    return MergeOptions(storage=options.storage, ops=options.ops)


def list_inputs(stores: Stores, unit: Unit, ops: str | None) -> list[str]:
    """Return where a model is, or what it is to be merged from, but for what the Hub has."""
    planned = unit.subject.planned
    if planned is None:
        return [unit.subject.url]
    try:
        own = read_own_ops(ops) if ops else None
        config = load_point(stores, planned.spectrum, planned.directory, planned.point.config, own)
    except MergeError:  # told of the model, once it is its turn
        return []
    places = (*config.input_models, *config.statistics_places)
    parts = (part for model in places for part in (model, model.adapter))
    paths = (part.path for part in parts if part is not None and not is_repository(part.path))
    return [stores.at(path).absolute(path) for path in paths]


def split_units(units: Iterable[Unit]) -> Iterator[Unit]:
    """Yield units of one task each, but for models that would have to be fetched or merged for each of them."""
    for unit in units:
        if unit.subject.url and scheme_of(unit.subject.url) == "file":
            yield from (replace(unit, tasks=(task,)) for task in unit.tasks)
        else:
            yield unit


def share_gpus(options: EvaluateOptions) -> list[str]:
    """Return for each worker of this machine its GPUs, as `CUDA_VISIBLE_DEVICES` names them.

    Empty where workers are given no GPUs of their own.

    Raises:
        ConfigError: there are not enough.
    """
    each, num_workers = options.gpus_per_model, options.workers
    if each is None and (num_workers or 1) == 1:
        return []
    if each == 0:
        return [""] * (num_workers or 1)
    return divide_gpus(list_gpus(), each, num_workers, can_share=options.backend != "vllm")


def divide_gpus(
    gpus: Sequence[str], each: float | None, num_workers: int | None, *, can_share: bool = True
) -> list[str]:
    """Return the GPUs of each worker, separated by commas.

    Args:
        gpus: all that there are.
        each: GPUs of a worker, or a share of one; by default as many as all can have.
        num_workers: by default as many as there are GPUs for.
        can_share: whether several workers may have one GPU where there are fewer than workers.

    Raises:
        ConfigError: there are not enough.

    >>> divide_gpus(["0", "1", "2"], None, 2), divide_gpus(["0", "1"], None, 3), divide_gpus(["0", "1"], 0.5, None)
    (['0', '1'], ['0', '1', '0'], ['0', '0', '1', '1'])
    """
    if each is None:
        num = num_workers or 1
        if num > len(gpus):
            if gpus and not can_share:
                raise ConfigError(
                    f"--workers {num}: vLLM takes whole GPUs, and this machine has {len(gpus)}; ask for {len(gpus)} or"
                    " fewer"
                )
            return [gpus[k % len(gpus)] for k in range(num)] if gpus else []
        each = float(len(gpus) // num)
    room = count_shares(len(gpus), each)
    if room < (num_workers or 1):
        raise ConfigError(
            f"--gpus-per-model {each:g}: {num_workers or 1} at once take more GPUs than this machine has ({len(gpus)});"
            " ask for fewer, or for fewer --workers"
        )
    if each < 1:
        return [gpus[k * len(gpus) // room] for k in range(num_workers or room)]
    return [",".join(gpus[k * int(each) : (k + 1) * int(each)]) for k in range(num_workers or room)]


def count_shares(num_gpus: int, each: float) -> int:
    """Return how many have room on so many GPUs, each with whole ones or with a share of one.

    >>> count_shares(2, 0.4), count_shares(5, 2)
    (4, 2)
    """
    return num_gpus * int(1 / each + 1e-9) if each < 1 else num_gpus // int(each)


def count_cpus(nodes: Sequence[Node], num_gpus: float, num_workers: int | None) -> int:
    """Return the processors of a model on a cluster, so that every node evaluates as many at once as it is to.

    Args:
        nodes: of the cluster.
        num_gpus: of a model.
        num_workers: models at once on a node; by default one, or as many as it has GPUs for.
    """
    if num_workers is None and num_gpus:
        return max(1, min(node.num_cpus // max(1, count_shares(node.num_gpus, num_gpus)) for node in nodes))
    return max(1, max(node.num_cpus for node in nodes) // (num_workers or 1))


def count_slots(node: Node, num_cpus: int, num_gpus: float) -> int:
    """Return how many models a node evaluates at once."""
    return min(node.num_cpus // num_cpus, count_shares(node.num_gpus, num_gpus) if num_gpus else node.num_cpus)
