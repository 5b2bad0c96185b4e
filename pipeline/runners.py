"""Runners of a merge's tasks: in processes of this machine or on Ray, with the modules that they need."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

from raymerge.cluster.fork_server import start_fork_server
from raymerge.cluster.process_runner import ProcessRunner, StartMethod, make_local_runner
from raymerge.cluster.runner import Report, Runner
from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.engine.gpu.devices import VARIABLE, require_gpus, start_cuda
from raymerge.pipeline.engine.readiness import LOOPS, prepare
from raymerge.pipeline.errors import ConfigError, FetchError, OutputError
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.plan.results import ShardResult
from raymerge.pipeline.plan.types import Gpus, ShardTask, TensorMerge
from raymerge.pipeline.redact import redact
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Sharing
from raymerge.pipeline.urls import repository_of, scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession

_EXECUTE = "raymerge.pipeline.engine.shard"

_CLUSTER_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "HF_ENDPOINT",
)
"""Environment variables that workers of a cluster get as they are here: where stores are, and none of the secrets."""


def list_cluster_variables() -> dict[str, str]:
    """Return the environment variables that workers of a cluster get as they are here.

    Raises:
        ConfigError: one has a password in it.
    """
    variables = {name: os.environ[name] for name in _CLUSTER_VARIABLES if name in os.environ}
    for name, value in variables.items():
        if redact(value) != value:
            raise ConfigError(
                f"{name} has a password in it, which all users of the cluster would see; give workers their credentials"
                " on their own machines"
            )
    return variables


def make_runner(
    stores: Stores,
    num_workers: int,
    urls: Sequence[str],
    session: RaySession | None = None,
    gpus: Gpus | None = None,
    on_retry: Callable[[str], None] = lambda reason: None,
    hired: ProcessRunner | None = None,
    merges: Iterable[TensorMerge] = (),
) -> Runner:
    """Return the runner for tasks that read from and write to these URLs.

    Args:
        stores: of this merge.
        num_workers: tasks in work at once on one machine.
        urls: of inputs and output; their storages say in which processes of this machine that can be.
        session: where the tasks run, if it is on Ray.
        gpus: what each machine merges on; None for the CPU.
        on_retry: told why a task is done again.
        hired: the processes of `prepare_workers`.
        merges: the tensors to be merged, for which processes that are forked from this one find everything prepared.
    """
    if hired is not None:
        hired.num_slots, hired.on_retry = num_workers, on_retry
        return hired
    if session is not None:
        from raymerge.cluster.ray.runner import RayRunner

        is_bound = not session.is_elsewhere and any(scheme_of(url) in ("file", "hf") for url in urls)
        num_slots = count_slots(num_workers, session, gpus)
        options: dict[str, Any] = {
            "num_cpus": _count_cpus(num_workers, session),
            "host": session.host if is_bound else None,  # nodes that join later have other files
            "retry_on": (FetchError, OutputError),  # a machine may have no way to a store, or no credentials for it
            "on_retry": on_retry,
            "advice": "allow less with --memory, make shards smaller with --shard-size, or add a larger node",
        }
        if gpus is None:
            return RayRunner(num_slots, **options)
        from raymerge.cluster.ray.actors import ActorRunner

        return ActorRunner(num_slots, num_sharing=gpus.num_sharing(num_workers), **options)
    start_method = _choose_start_method(stores, urls, on_gpus=gpus is not None)
    if gpus is not None:
        require_gpus()
        if start_method is StartMethod.FRESH and num_workers > 1:
            runner = _make_gpu_runner(num_workers)
            runner.num_slots, runner.on_retry = num_workers, on_retry
            return runner
    preload = _list_modules(stores, urls, start_method)
    if start_method is StartMethod.FORK and num_workers > 1:
        prepare(merges)
    return make_local_runner(num_workers, start_method, preload=preload, on_retry=on_retry)


def count_slots(num_workers: int, session: RaySession | None = None, gpus: Gpus | None = None) -> int:
    """Return how many tasks are in work at once on all machines; see `make_runner`."""
    if session is None:
        return num_workers
    num_cpus = _count_cpus(num_workers, session)
    if gpus is None:
        return sum(node.num_cpus // num_cpus for node in session.nodes)
    num_sharing = gpus.num_sharing(num_workers)
    return sum(min(node.num_cpus // num_cpus, node.num_gpus * num_sharing) for node in session.nodes)


def check_reach(stores: Stores, urls: Sequence[str], session: RaySession, *, shared_filesystem: bool) -> None:
    """Make sure that workers on other machines find what they are to read and write.

    Args:
        stores: of this merge.
        urls: of inputs and output.
        session: where the tasks run.
        shared_filesystem: whether paths mean the same files on every machine.

    Raises:
        ConfigError: they would not.
    """
    if inside := [url for url in urls if stores.at(url).sharing is Sharing.THREADS]:
        raise ConfigError(f"{', '.join(inside)}: only this process has it; use another store, or leave Ray out")
    if not session.is_elsewhere:
        return
    paths = [url for url in urls if scheme_of(url) == "file"]
    if paths and not shared_filesystem:
        raise ConfigError(
            f"{', '.join(paths)}: paths of this machine, and the cluster has other machines; use URLs such as"
            " s3://bucket/model, or say --shared-filesystem if the paths mean the same files everywhere"
        )
    if repository_of(urls[0]) is not None:
        raise ConfigError(
            f"{urls[0]}: shards for the Hub are gathered on one machine, and the cluster has others; merge to"
            " a bucket, or leave --address out"
        )


def prepare_workers(
    stores: Stores, models: Sequence[str], outs: Sequence[str], num_workers: int, *, on_gpus: bool
) -> ProcessRunner | None:
    """Begin to import what workers will need, and to start CUDA, while the merge is planned.

    Args:
        stores: of this merge.
        models: as the config names them.
        outs: paths or URLs of the outputs.
        num_workers: tasks in work at once, at most.
        on_gpus: whether workers merge on GPUs.

    Returns:
        The processes, where they have been started already; to be closed.
    """
    urls = [*outs, *(f"hf://{name}" if is_repository(name) else name for name in models)]
    start_method = _choose_start_method(stores, urls, on_gpus=on_gpus)
    if start_method is not StartMethod.FRESH:
        return None
    if not on_gpus:
        start_fork_server(_list_modules(stores, urls, start_method))
        return None
    runner = _make_gpu_runner(num_workers)
    runner.hire()
    return runner


def _make_gpu_runner(num_workers: int) -> ProcessRunner:
    """Return a process for each GPU: one CUDA context, and a thread for each worker that shares the GPU.

    Torch, hashing and I/O leave the interpreter lock alone, and a GPU needs few calls.
    """
    environments = [{VARIABLE: gpu} for gpu in require_gpus()]
    num_processes = min(num_workers, len(environments))
    return ProcessRunner(
        num_processes,
        StartMethod.FRESH,
        num_threads=-(-num_workers // num_processes),
        environments=environments,
        prepare=start_cuda,
    )


def run_shard(stores: Stores, task: ShardTask, report: Report, *, journals: Sequence[Journal]) -> ShardResult:
    """Run a task; a driver that has it run elsewhere need not import what it takes."""
    from raymerge.pipeline.engine import shard as execute

    return execute.run_shard(stores, task, report, journals=journals)


def _count_cpus(num_workers: int, session: RaySession) -> int:
    """Return the processors of a task: Ray knows no other limit for each node."""
    return -(-max(node.num_cpus for node in session.nodes) // num_workers)


def _choose_start_method(stores: Stores, urls: Sequence[str], *, on_gpus: bool) -> StartMethod:
    sharing = {stores.at(url).sharing for url in urls}
    if Sharing.THREADS in sharing:
        return StartMethod.THREAD
    is_fresh = on_gpus or Sharing.FRESH in sharing  # CUDA does not survive a fork
    return StartMethod.FRESH if is_fresh else StartMethod.FORK


def _list_modules(stores: Stores, urls: Sequence[str], start_method: StartMethod) -> list[str]:
    """Return the modules that workers need for these URLs, besides what `prepare` imports for forked ones."""
    arithmetic = [*LOOPS] if start_method is StartMethod.FRESH else []
    return [_EXECUTE, *arithmetic, *sorted({type(stores.at(url)).__module__ for url in urls})]
