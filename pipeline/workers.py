"""Where the tasks of a merge run: in which processes of this machine, or on Ray; and what they find there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.cluster.process_runner import StartMethod, make_local_runner, start_fork_server
from raymerge.cluster.runner import Report, Runner
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.gpus import VARIABLE, require_gpus
from raymerge.pipeline.journal import Journal
from raymerge.pipeline.sources import HUB_NAME
from raymerge.pipeline.storage import Sharing, StorageSettings, storage_for
from raymerge.pipeline.stores.retry import FAULTS
from raymerge.pipeline.types import Gpus, ShardResult, ShardTask
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.ray_session import RaySession

_EXECUTE = "raymerge.pipeline.execute"

CLUSTER_VARIABLES = (
    "AWS_ENDPOINT_URL",
    "AWS_ENDPOINT_URL_S3",
    "AWS_REGION",
    "AWS_DEFAULT_REGION",
    "AWS_PROFILE",
    "AZURE_STORAGE_ACCOUNT_NAME",
    "HF_ENDPOINT",
)
"""Environment variables that workers of a cluster get as they are here: where stores are, and none of the secrets."""


def make_runner(
    num_workers: int, urls: Sequence[str], session: RaySession | None = None, gpus: Gpus | None = None
) -> Runner:
    """Return what runs tasks that read from and write to these URLs.

    Args:
        num_workers: tasks in work at once on one machine.
        urls: of inputs and output; their storages say in which processes of this machine that can be.
        session: where the tasks run, if it is on Ray.
        gpus: what each machine merges on; None for the CPU.
    """
    if session is not None:
        from raymerge.cluster.ray_runner import RayRunner

        # Ray knows no limit for each node but its processors.
        num_cpus = -(-max(node.num_cpus for node in session.nodes) // num_workers)
        is_bound = not session.is_elsewhere and any(scheme_of(url) == "file" for url in urls)
        host = session.host if is_bound else None  # nodes that join later have other files
        if gpus is not None:
            from raymerge.cluster.ray_actors import ActorRunner

            num_sharing = gpus.num_sharing(num_workers)
            num_slots = sum(min(node.num_cpus // num_cpus, node.num_gpus * num_sharing) for node in session.nodes)
            return ActorRunner(num_slots, num_sharing=num_sharing, num_cpus=num_cpus, host=host, on_retry=_note_retry)
        num_slots = sum(node.num_cpus // num_cpus for node in session.nodes)
        return RayRunner(num_slots, num_cpus=num_cpus, host=host, on_retry=_note_retry)
    environments = [{VARIABLE: gpu} for gpu in require_gpus()] if gpus is not None else []
    start_method = _choose_start_method(urls, on_gpus=gpus is not None)
    return make_local_runner(num_workers, start_method, preload=_list_modules(urls), environments=environments)


def _note_retry(reason: str) -> None:
    FAULTS.note("ray", "shard", reason)


def check_reach(urls: Sequence[str], session: RaySession, *, shared_filesystem: bool) -> None:
    """Make sure that workers on other machines find what they are to read and write.

    Args:
        urls: of inputs and output.
        session: where the tasks run.
        shared_filesystem: whether paths mean the same files on every machine.

    Raises:
        ConfigError: they would not.
    """
    if inside := [url for url in urls if storage_for(url).sharing is Sharing.THREADS]:
        raise ConfigError(f"{', '.join(inside)}: only this process has it; use another store, or leave Ray out")
    if not session.is_elsewhere:
        return
    paths = [url for url in urls if scheme_of(url) == "file"]
    if paths and not shared_filesystem:
        raise ConfigError(
            f"{', '.join(paths)}: paths of this machine, and the cluster has other machines; use URLs such as"
            " s3://bucket/model, or say --shared-filesystem if the paths mean the same files everywhere"
        )
    if scheme_of(urls[0]) == "hf":
        raise ConfigError(
            f"{urls[0]}: shards for the Hub are gathered on one machine, and the cluster has others; merge to"
            " a bucket, or leave --address out"
        )


def prepare_workers(models: Sequence[str], out: str, *, on_gpus: bool) -> None:
    """Begin to import what workers will need, while the merge is planned.

    Args:
        models: as the config names them.
        out: path or URL of the output.
        on_gpus: whether workers merge on GPUs.
    """
    urls = [out, *(f"hf://{name}" if HUB_NAME.fullmatch(name) and not Path(name).exists() else name for name in models)]
    if _choose_start_method(urls, on_gpus=on_gpus) is StartMethod.FRESH:
        start_fork_server(_list_modules(urls))


def run_shard(task: ShardTask, report: Report, *, journal: Journal, settings: StorageSettings) -> ShardResult:
    """Do what `execute.run_shard` does; a driver that has it done elsewhere need not import torch."""
    from raymerge.pipeline import execute

    return execute.run_shard(task, report, journal=journal, settings=settings)


def _choose_start_method(urls: Sequence[str], *, on_gpus: bool) -> StartMethod:
    sharing = {storage_for(url).sharing for url in urls}
    if Sharing.THREADS in sharing:
        return StartMethod.THREAD
    is_fresh = on_gpus or Sharing.FRESH in sharing  # CUDA does not survive a fork
    return StartMethod.FRESH if is_fresh else StartMethod.FORK


def _list_modules(urls: Sequence[str]) -> list[str]:
    """Return the modules that workers need for these URLs."""
    return [_EXECUTE, *sorted({type(storage_for(url)).__module__ for url in urls})]
