"""Runs work on this machine, in processes of its own."""

from __future__ import annotations

import importlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
import os
import signal
import sys
import threading
import time
import types
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any

from raymerge.cluster.errors import WorkerLostError
from raymerge.cluster.fork_server import place_sockets
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.outcome import Done, Failed
from raymerge.cluster.runner import NUM_ATTEMPTS, Item, Progress, Report, Resources, Result, Runner, Work
from raymerge.cluster.waiting import Waiting
from raymerge.cluster.worker_process import Stop, serve_forked, serve_fresh

_PATIENCE_SECONDS = 3.0
"""For workers to end what they are doing when the run is broken off."""


@dataclass(frozen=True, slots=True)
class _Lost:
    """In place of a worker's message: it is dead."""

    how: str
    is_killed: bool
    """By SIGKILL, as the kernel does where memory runs out."""


@dataclass(slots=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection
    life: Connection
    """Nobody else can write to it: that it is closed tells the worker that the driver is gone."""
    slot: int
    """Number of its process among those that run at once."""
    item: int = -1
    """Position of the item in work, or of its last one; -1 before the first."""
    reported: Progress = field(default_factory=Progress)
    """Progress of that item."""


class StartMethod(Enum):
    """Ways in which workers are started."""

    FORK = "fork"
    """Forked from this process: they share what is imported already. Linux only."""
    FRESH = "forkserver"
    """Forked from a process that was started for it and has only imported: for libraries that no fork survives."""
    THREAD = "thread"
    """Threads of this process: for what cannot leave it."""


class ProcessRunner(Runner):
    """A few processes, each running one item after the other, the costliest items first; or one on each of its threads.

    Work that makes many short calls, as merging does, loses a third of its time to the interpreter lock when it runs on
    threads. The processes end with this one, however it ends.
    """

    num_slots: int
    """Items in work at once; may be lowered before a run."""
    on_retry: Callable[[str], None]
    """Told why an item is done again: its worker has died."""

    def __init__(
        self,
        num_processes: int,
        start_method: StartMethod = StartMethod.FORK,
        *,
        num_threads: int = 1,
        preload: Sequence[str] = (),
        environments: Sequence[Mapping[str, str]] = (),
        on_retry: Callable[[str], None] = lambda reason: None,
        prepare: Callable[[], None] | None = None,
    ) -> None:
        """Begin.

        Args:
            num_processes: that run at once.
            start_method: how they come into being.
            num_threads: of each process that has been started fresh, each of which runs items.
            preload: modules that workers need; imported once for all processes.
            environments: variables that fresh processes have besides, in turn.
            on_retry: told why an item is done again.
            prepare: called in each fresh process before anything else.
        """
        if num_processes < 1:
            raise ValueError(f"{num_processes} processes are given, at least 1 is needed")
        self.num_processes = num_processes
        self.num_per_process = num_threads
        self.num_slots = num_processes * num_threads
        self.on_retry = on_retry
        self._environments = environments or ({},)
        self._prepare = prepare
        self._hired: list[_Worker] = []
        self._context: Any = multiprocessing.get_context(start_method.value)
        if start_method is StartMethod.FRESH:
            place_sockets()
            self._context.set_forkserver_preload(list(preload))
        else:
            for name in preload:
                importlib.import_module(name)

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes; see `Runner.run`. The item of a worker that dies is done again."""
        if self._context.get_start_method() == "fork":  # workers have the items already, which may be large
            yield from self._run(partial(_work_on, work, items), range(len(items)), resources, on_progress)
        else:
            yield from self._run(work, items, resources, on_progress)

    def _run(
        self, work: Work[Any, Result], items: Sequence[Any], resources: Sequence[Resources], on_progress: Report
    ) -> Iterator[Result]:
        waiting = Waiting(resources, self.num_slots)
        workers: list[_Worker] = []
        busy: dict[Connection, _Worker] = {}
        num_lost: Counter[int] = Counter()
        error: BaseException | None = None
        try:
            if items:
                workers, self._hired = self._hired, workers
            for first in workers[:: self.num_per_process]:
                _send_work(work, first)
            for slot in range(len(workers) // self.num_per_process, min(self.num_processes, len(items))):
                workers += self._start(work, workers, slot)
            idle = [worker for k in range(self.num_per_process) for worker in workers[k :: self.num_per_process]][::-1]
            _assign(idle, busy, items, waiting)
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker = busy[connection]
                    message = _receive(worker)
                    if isinstance(message, Progress):
                        worker.reported += message.without_notes()
                        on_progress(message)
                        continue
                    del busy[connection]
                    if isinstance(message, _Lost):
                        num_lost[worker.item] += 1
                        if error is None and num_lost[worker.item] < NUM_ATTEMPTS:
                            on_progress(-worker.reported)
                            self.on_retry(message.how)
                            waiting.release(worker.item)
                            waiting.repeat(worker.item)
                            idle = [each for each in idle if each.process is not worker.process]
                            if all(each.process is not worker.process for each in busy.values()):
                                idle += self._replace(work, worker, workers)
                            _assign(idle, busy, items, waiting)
                            continue
                        message = _give_up(message, num_lost[worker.item])
                    if isinstance(message, Failed):
                        waiting.clear()
                        error = error or message.error
                        for other in busy.values():
                            _stop(other)
                    waiting.release(worker.item)
                    idle.append(worker)
                    _assign(idle, busy, items, waiting)
                    if waiting and error is None and self.num_per_process == 1:  # for room: idle workers keep theirs
                        idle = [
                            new
                            for each in idle
                            for new in (self._replace(work, each, workers) if each.item >= 0 else [each])
                        ]
                    if isinstance(message, Done):
                        yield message.result
        except BaseException:  # raised again: whatever broke the run off, its workers end
            _end(workers, _PATIENCE_SECONDS)
            raise
        _end(workers, None)
        if error is not None:
            raise error

    def hire(self) -> None:
        """Start fresh processes ahead of the first run, which uses them; `close` ends them if there is none."""
        for slot in range(self.num_processes):
            self._hired += self._start(None, self._hired, slot)

    def close(self) -> None:
        """End processes that no run has used, whatever they are doing."""
        for worker in self._hired:
            worker.process.kill()
        _end(self._hired, None)
        self._hired = []

    def _replace(self, work: Work[Any, Any], old: _Worker, workers: list[_Worker]) -> list[_Worker]:
        """Start workers in place of those of a process that is idle, or dead."""
        for each in [each for each in workers if each.process is old.process]:
            each.connection.close()
            workers.remove(each)
        old.process.join()
        old.life.close()
        started = self._start(work, workers, old.slot)
        workers += started
        return started

    def _start(self, work: Work[Any, Any] | None, others: Sequence[_Worker], slot: int) -> list[_Worker]:
        """Start a process and return its workers; a fresh one whose work comes later if there is none yet."""
        pipes = [self._context.Pipe() for _ in range(self.num_per_process)]
        life, held = self._context.Pipe(duplex=False)
        theirs = [their for _, their in pipes]
        if self._context.get_start_method() == "fork":
            inherited = [
                held,
                *(our for our, _ in pipes),
                *(end for each in others for end in (each.connection, each.life)),
            ]
            process = self._context.Process(target=serve_forked, args=(theirs[0], life, inherited, work), daemon=True)
            with warnings.catch_warnings():  # forking is safe beside our own threads: workers take none of their locks
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        else:
            own = self._environments[slot % len(self._environments)]
            environment = os.environ | own  # the fork server may be older than what is in it now
            arguments = (theirs, life, environment, self._prepare)
            process = self._context.Process(target=serve_fresh, args=arguments, daemon=True)
            with _without_main():
                process.start()
        for their in theirs:
            their.close()
        life.close()
        workers = [_Worker(process, our, held, slot) for our, _ in pipes]
        if work is not None and self._context.get_start_method() != "fork":
            _send_work(work, workers[0])
        return workers


def make_local_runner(
    num_workers: int,
    start_method: StartMethod,
    *,
    preload: Sequence[str] = (),
    on_retry: Callable[[str], None] = lambda reason: None,
) -> Runner:
    """Return the runner for this machine: with processes where they can be had and are of use, else threads.

    Args:
        num_workers: items in work at once.
        start_method: how workers may come into being.
        preload: modules that workers need; imported once for all of them where they are started fresh.
        on_retry: told why an item is done again: its worker has died.
    """
    is_fork = start_method is StartMethod.FORK
    if num_workers == 1 or start_method is StartMethod.THREAD or (is_fork and sys.platform != "linux"):
        return LocalRunner(num_workers)
    return ProcessRunner(num_workers, start_method, preload=preload, on_retry=on_retry)


_main_lock = threading.Lock()


@contextmanager
def _without_main() -> Iterator[None]:
    """Keep a starting process from running the user's script again, which has nothing that it needs."""
    with _main_lock:  # two runs that start at once would take each other's for the script
        main = sys.modules["__main__"]
        sys.modules["__main__"] = types.ModuleType("__main__")
        try:
            yield
        finally:
            sys.modules["__main__"] = main


def _assign(idle: list[_Worker], busy: dict[Connection, _Worker], items: Sequence[Any], waiting: Waiting) -> None:
    """Give idle workers the items that there is room for."""
    while idle and (item := waiting.take()) is not None:
        worker = idle.pop()
        worker.item, worker.reported = item, Progress()
        with suppress(OSError):  # it has died; that is noticed when its answer is read
            worker.connection.send(items[item])
        busy[worker.connection] = worker


def _work_on(work: Work[Item, Result], items: Sequence[Item], position: int, report: Report) -> Result:
    return work(items[position], report)


def _send_work(work: Work[Any, Any], worker: _Worker) -> None:
    """Tell a process what to do, by one of its workers."""
    with suppress(OSError):  # as in `_assign`
        worker.connection.send(work)


def _stop(worker: _Worker) -> None:
    """Have a worker end what it is doing at its next report."""
    with suppress(OSError):
        worker.connection.send(Stop())


def _receive(worker: _Worker) -> Progress | Done | Failed | _Lost:
    try:
        message: Progress | Done | Failed = worker.connection.recv()
    except (EOFError, OSError):  # also in the middle of a message
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return _Lost(f"its worker process {how}", is_killed=code == -signal.SIGKILL)
    return message


def _give_up(lost: _Lost, num_attempts: int) -> Failed:
    after = f"gave up an item after {num_attempts} attempts, at last because " if num_attempts > 1 else ""
    why, advice = "", ""
    if lost.is_killed:
        why, advice = "; memory may have run out", ", with fewer --workers or less --memory"
    return Failed(
        WorkerLostError(f"{after}{lost.how}{why}; what is finished is kept: run the same command again{advice}")
    )


def _end(workers: Sequence[_Worker], patience_seconds: float | None) -> None:
    """Have workers end, at their next report or after so many seconds."""
    for worker in workers:
        worker.connection.close()
    deadline = None if patience_seconds is None else time.monotonic() + patience_seconds
    for worker in workers:
        worker.process.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        if worker.process.is_alive():
            worker.process.kill()
        worker.life.close()
