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
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

from raymerge.cluster.directory import make_directory
from raymerge.cluster.errors import StoppedError, WorkerLostError
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.outcome import Done, Failed, make_picklable
from raymerge.cluster.runner import NUM_ATTEMPTS, Item, Progress, Report, Resources, Result, Runner, Work
from raymerge.cluster.waiting import Waiting

_PATIENCE_SECONDS = 3.0
"""For workers to end what they are doing when the run is broken off."""


@dataclass(frozen=True, slots=True)
class _Stop:
    """Sent to workers in place of an item."""


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
    """Which of the workers that run at once it is."""
    item: int = -1
    """Position of the item in work, or of its last one; -1 before the first."""
    reported: Progress = field(default_factory=Progress)
    """Progress of that item."""


class StartMethod(Enum):
    """How workers come into being."""

    FORK = "fork"
    """Forked from this process: they share what is imported already. Linux only."""
    FRESH = "forkserver"
    """Forked from a process that was started for it and has only imported: for libraries that no fork survives."""
    THREAD = "thread"
    """Threads of this process: for what cannot leave it."""


class ProcessRunner(Runner):
    """A few processes, each running one item after the other, the costliest items first.

    Work that makes many short calls, as merging does, loses a third of its time to the interpreter lock when it runs on
    threads. The processes end with this one, however it ends.
    """

    def __init__(
        self,
        num_processes: int,
        start_method: StartMethod = StartMethod.FORK,
        *,
        preload: Sequence[str] = (),
        environments: Sequence[Mapping[str, str]] = (),
        on_retry: Callable[[str], None] = lambda reason: None,
    ) -> None:
        if num_processes < 1:
            raise ValueError(f"{num_processes} processes are given, at least 1 is needed")
        self.num_processes = num_processes
        self._environments = environments or ({},)
        self._on_retry = on_retry
        self._context: Any = multiprocessing.get_context(start_method.value)
        if start_method is StartMethod.FRESH:
            _place_sockets()
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
        waiting = Waiting(resources, self.num_processes)
        workers: list[_Worker] = []
        busy: dict[Connection, _Worker] = {}
        num_lost: Counter[int] = Counter()
        error: BaseException | None = None
        try:
            for slot in range(min(self.num_processes, len(items))):
                workers.append(self._start(work, workers, slot))
            idle = workers[::-1]
            _assign(idle, busy, items, waiting)
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker = busy[connection]
                    message = _receive(worker)
                    if isinstance(message, Progress):
                        worker.reported += message
                        on_progress(message)
                        continue
                    del busy[connection]
                    if isinstance(message, _Lost):
                        num_lost[worker.item] += 1
                        if error is None and num_lost[worker.item] < NUM_ATTEMPTS:
                            on_progress(-worker.reported)
                            self._on_retry(message.how)
                            waiting.release(worker.item, is_again=True)
                            idle.append(self._replace(work, worker, workers))
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
                    if waiting and error is None:  # for room: what idle workers keep is theirs
                        idle = [self._replace(work, each, workers) if each.item >= 0 else each for each in idle]
                    if isinstance(message, Done):
                        yield message.result
        except BaseException:  # raised again: whatever broke the run off, its workers end
            _end(workers, _PATIENCE_SECONDS)
            raise
        _end(workers, None)
        if error is not None:
            raise error

    def _replace(self, work: Work[Any, Any], old: _Worker, workers: list[_Worker]) -> _Worker:
        """Start a worker in place of one that is idle, or dead."""
        old.connection.close()
        old.process.join()
        old.life.close()
        workers.remove(old)
        workers.append(self._start(work, workers, old.slot))
        return workers[-1]

    def _start(self, work: Work[Any, Any], others: Sequence[_Worker], slot: int) -> _Worker:
        ours, theirs = self._context.Pipe()
        life, held = self._context.Pipe(duplex=False)
        if self._context.get_start_method() == "fork":
            inherited = [ours, held, *(end for other in others for end in (other.connection, other.life))]
            process = self._context.Process(target=_serve_forked, args=(theirs, life, inherited, work), daemon=True)
            with warnings.catch_warnings():  # forking is safe beside our own threads: workers take none of their locks
                warnings.simplefilter("ignore", DeprecationWarning)
                process.start()
        else:
            own = self._environments[slot % len(self._environments)]
            environment = os.environ | own  # the fork server may be older than what is in it now
            process = self._context.Process(target=_serve_fresh, args=(theirs, life, environment, work), daemon=True)
            with _without_main():
                process.start()
        theirs.close()
        life.close()
        return _Worker(process, ours, held, slot)


def start_fork_server(preload: Sequence[str]) -> None:
    """Start the process that fresh workers are forked from, unless it runs already, and let it import.

    Args:
        preload: modules that workers need.
    """
    _place_sockets()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    multiprocessing.forkserver.ensure_running()


@cache
def _place_sockets() -> None:
    """Have the fork server's socket in a directory that a later run deletes if this process is killed.

    multiprocessing makes a directory of its own in TMPDIR otherwise, whose name may be too long for sockets.
    """
    stack = ExitStack()
    multiprocessing.util.Finalize(None, stack.close, exitpriority=-200)  # after multiprocessing's own, at -100
    with suppress(OSError):
        directory = str(stack.enter_context(make_directory()))
        # private, but tempfile.tempdir would move the files of other threads, too
        multiprocessing.current_process()._config.setdefault("tempdir", directory)  # type: ignore[attr-defined]


def make_local_runner(
    num_workers: int,
    start_method: StartMethod,
    *,
    preload: Sequence[str] = (),
    environments: Sequence[Mapping[str, str]] = (),
    on_retry: Callable[[str], None] = lambda reason: None,
) -> Runner:
    """Return the runner for this machine: with processes where they can be had and are of use, else threads.

    Args:
        num_workers: items in work at once.
        start_method: how workers may come into being.
        preload: modules that workers need; imported once for all of them where they are started fresh.
        environments: variables that fresh workers have besides, the first worker the first of these and so on, in turn.
        on_retry: told why an item is done again: its worker has died.
    """
    is_fork = start_method is StartMethod.FORK
    if num_workers == 1 or start_method is StartMethod.THREAD or (is_fork and sys.platform != "linux"):
        return LocalRunner(num_workers)
    return ProcessRunner(num_workers, start_method, preload=preload, environments=environments, on_retry=on_retry)


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


def _stop(worker: _Worker) -> None:
    """Have a worker end what it is doing at its next report."""
    with suppress(OSError):
        worker.connection.send(_Stop())


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


def _serve_forked(
    connection: Connection, life: Connection, inherited: Sequence[Connection], work: Work[Any, Any]
) -> None:
    for other in inherited:
        other.close()
    _serve(connection, life, work)


def _serve_fresh(
    connection: Connection, life: Connection, environment: Mapping[str, str], work: Work[Any, Any]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    _serve(connection, life, work)


def _end_with_driver(life: Connection) -> None:
    wait([life])
    os._exit(1)


def _serve(connection: Connection, life: Connection, work: Work[Any, Any]) -> None:
    """Run items in a worker process until the driver has no more."""
    for number in (signal.SIGINT, signal.SIGHUP):  # the driver is interrupted, and stops us
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_driver, args=(life,), name="end with driver", daemon=True).start()

    def report(progress: Progress) -> None:
        if connection.poll():  # what the driver sends to a busy worker, and its leaving, mean one thing
            raise StoppedError("stopped")
        connection.send(progress)

    try:
        while not isinstance(item := connection.recv(), _Stop):
            message: Done | Failed
            try:
                message = Done(work(item, report))
            except BaseException as error:
                message = Failed(make_picklable(error))
            connection.send(message)
    except (EOFError, ConnectionError):  # the driver has left
        return
