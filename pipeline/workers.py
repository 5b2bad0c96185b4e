"""How the tasks of a merge come to run on this machine: in which processes, and with what in them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from raymerge.cluster.process_runner import StartMethod, make_local_runner, start_fork_server
from raymerge.cluster.runner import Report, Runner
from raymerge.pipeline.journal import Journal
from raymerge.pipeline.sources import HUB_NAME
from raymerge.pipeline.storage import Sharing, StorageSettings, storage_for
from raymerge.pipeline.types import ShardResult, ShardTask

_EXECUTE = "raymerge.pipeline.execute"


def make_runner(num_workers: int, urls: Sequence[str]) -> Runner:
    """Return what runs tasks that read from and write to these URLs, as their storages allow it."""
    return make_local_runner(num_workers, _choose_start_method(urls), preload=_list_modules(urls))


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
