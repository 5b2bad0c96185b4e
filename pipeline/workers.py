"""Where the tasks of a merge run: in which processes of this machine, or on Ray; and what they find there."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from raymerge.cluster.process_runner import StartMethod, make_local_runner, start_fork_server
from raymerge.cluster.runner import Report, Runner
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.journal import Journal
from raymerge.pipeline.sources import HUB_NAME
from raymerge.pipeline.storage import Sharing, StorageSettings, storage_for
from raymerge.pipeline.stores.retry import FAULTS
from raymerge.pipeline.types import ShardResult, ShardTask
from raymerge.pipeline.urls import check_url, is_url, scheme_of

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


def make_runner(num_workers: int, urls: Sequence[str], session: RaySession | None = None) -> Runner:
    """Return what runs tasks that read from and write to these URLs.

    Args:
        num_workers: tasks in work at once on one machine.
        urls: of inputs and output; their storages say in which processes of this machine that can be.
        session: where the tasks run, if it is on Ray.
    """
    if session is not None:
        from raymerge.cluster.ray_runner import RayRunner

        # Ray knows no limit for each node but its processors.
        num_cpus = -(-max(node.num_cpus for node in session.nodes) // num_workers)
        is_bound = not session.is_elsewhere and any(scheme_of(url) == "file" for url in urls)
        return RayRunner(
            sum(node.num_cpus // num_cpus for node in session.nodes),
            num_cpus=num_cpus,
            host=session.host if is_bound else None,  # nodes that join later have other files
            on_retry=lambda reason: FAULTS.note("ray", "shard", reason),
        )
    return make_local_runner(num_workers, _choose_start_method(urls), preload=_list_modules(urls))


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


def check_places(out: str, models: Sequence[str], *, is_spread: bool, shared_filesystem: bool) -> None:
    """Make sure that machines which a scheduler will choose find what they are to read and write.

    Args:
        out: path or URL of the output.
        models: as the config names them.
        is_spread: whether several machines take part.
        shared_filesystem: whether paths mean the same files on every machine.

    Raises:
        ConfigError: they would not.
    """
    places = [out, *(name for name in models if is_url(name) or Path(name).exists() or not HUB_NAME.fullmatch(name))]
    for place in places:
        check_url(place)
    if inside := [place for place in places if is_url(place) and storage_for(place).sharing is Sharing.THREADS]:
        raise ConfigError(f"{', '.join(inside)}: only the process that writes it has it; use another store")
    paths = [place for place in places if scheme_of(place) == "file"]
    if paths and not shared_filesystem:
        raise ConfigError(
            f"{', '.join(paths)}: paths of this machine, and the job runs on others; use URLs such as s3://bucket/model,"
            " or say --shared-filesystem if the paths mean the same files everywhere"
        )
    if relative := [path for path in paths if not is_url(path) and not Path(path).is_absolute()]:
        raise ConfigError(f"{', '.join(relative)}: the job starts in another directory; write the paths out from /")
    if scheme_of(out) == "hf" and is_spread:
        raise ConfigError(
            f"{out}: shards for the Hub are gathered on one machine, and the job has several; merge to a bucket"
        )


def prepare_workers(models: Sequence[str], out: str) -> None:
    """Begin to import what workers will need, while the merge is planned.

    Args:
        models: as the config names them.
        out: path or URL of the output.
    """
    urls = [out, *(f"hf://{name}" if HUB_NAME.fullmatch(name) and not Path(name).exists() else name for name in models)]
    if _choose_start_method(urls) is StartMethod.FRESH:
        start_fork_server(_list_modules(urls))


def run_shard(task: ShardTask, report: Report, *, journal: Journal, settings: StorageSettings) -> ShardResult:
    """Do what `execute.run_shard` does; a driver that has it done elsewhere need not import torch."""
    from raymerge.pipeline import execute

    return execute.run_shard(task, report, journal=journal, settings=settings)


def _choose_start_method(urls: Sequence[str]) -> StartMethod:
    sharing = {storage_for(url).sharing for url in urls}
    if Sharing.THREADS in sharing:
        return StartMethod.THREAD
    return StartMethod.FRESH if Sharing.FRESH in sharing else StartMethod.FORK


def _list_modules(urls: Sequence[str]) -> list[str]:
    """Return the modules that workers need for these URLs."""
    return [_EXECUTE, *sorted({type(storage_for(url)).__module__ for url in urls})]
