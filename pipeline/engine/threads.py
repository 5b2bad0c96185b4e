"""Threads that merge one window together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from raymerge.cluster.host import count_cores
from raymerge.ops.stored import RunAll


@contextmanager
def open_threads(num_threads: int) -> Iterator[RunAll]:
    """Provide threads, not more than there are cores; the caller's own where one is enough."""
    num_threads = min(num_threads, count_cores())
    if num_threads == 1:
        yield run_in_turn
        return
    with ThreadPoolExecutor(num_threads, thread_name_prefix="merge") as pool:

        def run_all(calls: Sequence[Callable[[], Any]]) -> list[Any]:
            futures = [pool.submit(call) for call in calls]
            wait(futures)  # before any error is raised: the others still write to buffers
            return [future.result() for future in futures]

        yield run_all


def run_in_turn(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Call functions one after the other; see `RunAll`."""
    return [call() for call in calls]
