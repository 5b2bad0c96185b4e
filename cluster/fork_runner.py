"""Runs work on this machine, in processes forked from this one."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from raymerge.cluster.errors import StoppedError, WorkerLostError
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Item, Progress, Report, Resources, Result, Runner, Work

_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class _Done:
    result: Any


@dataclass(frozen=True, slots=True)
class _Failed:
    error: BaseException


@dataclass(frozen=True, slots=True)
class _Worker:
    process: multiprocessing.process.BaseProcess
    connection: Connection


class ForkRunner(Runner):
    """A few processes, each running one item after the other, the costliest items first.

    Work that makes many short calls, as merging does, loses a third of its time to the interpreter lock when it runs on
    threads. Forked processes share what is imported already. They end with this process, however it ends.
    """

    def __init__(self, num_processes: int) -> None:
        if num_processes < 1:
            raise ValueError(f"{num_processes} processes are given, at least 1 is needed")
        self.num_processes = num_processes

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes; see `Runner.run`."""
        waiting = deque(sorted(range(len(items)), key=lambda i: (-resources[i].cost, i)))
        stop = mmap.mmap(-1, 1)  # shared with the workers
        workers: list[_Worker] = []
        error: BaseException | None = None
        try:
            for _ in range(min(self.num_processes, len(items))):
                workers.append(_start(work, items, stop, workers))
            busy = {worker.connection: worker for worker in workers if _assign(worker, waiting)}
            while busy:
                for connection in wait(list(busy)):
                    assert isinstance(connection, Connection)
                    worker = busy[connection]
                    message = _receive(worker)
                    if isinstance(message, Progress):
                        on_progress(message)
                        continue
                    if isinstance(message, _Failed):
                        stop[0] = 1
                        waiting.clear()
                        error = error or message.error
                    if not _assign(worker, waiting):
                        del busy[connection]
                    if isinstance(message, _Done):
                        yield message.result
        finally:
            stop[0] = 1
            for worker in workers:
                worker.connection.close()
            for worker in workers:
                worker.process.join()
        if error is not None:
            raise error


def make_local_runner(num_workers: int) -> Runner:
    """Return what runs work on this machine: processes where they can be forked safely, else threads."""
    return ForkRunner(num_workers) if num_workers > 1 and sys.platform == "linux" else LocalRunner(num_workers)


def _start(work: Work[Any, Any], items: Sequence[Any], stop: mmap.mmap, others: Sequence[_Worker]) -> _Worker:
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe()
    inherited = [ours, *(other.connection for other in others)]
    process = context.Process(target=_serve, args=(theirs, inherited, work, items, stop, os.getpid()), daemon=True)
    with warnings.catch_warnings():  # forking is safe beside our own threads: workers take none of their locks
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _assign(worker: _Worker, waiting: deque[int]) -> bool:
    """Give a worker its next item, if there is one."""
    if not waiting:
        return False
    worker.connection.send(waiting.popleft())
    return True


def _receive(worker: _Worker) -> Progress | _Done | _Failed:
    try:
        message: Progress | _Done | _Failed = worker.connection.recv()
    except (EOFError, ConnectionError):
        worker.process.join()
        code = worker.process.exitcode or 0
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return _Failed(WorkerLostError(f"a worker process {how}; what is finished is kept: run the same command again"))
    return message


def _serve(
    connection: Connection, inherited: Sequence[Connection], work: Work[Any, Any], items: Sequence[Any],
    stop: mmap.mmap, parent: int,
) -> None:  # fmt: skip
    """Run items in a worker process until the driver has no more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver is interrupted, and stops us
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    for other in inherited:
        other.close()

    def report(progress: Progress) -> None:
        if stop[0]:
            raise StoppedError("stopped")
        connection.send(progress)

    try:
        while True:
            item = items[connection.recv()]
            message: _Done | _Failed
            try:
                message = _Done(work(item, report))
            except BaseException as error:
                message = _Failed(_picklable(error))
            connection.send(message)
    except (EOFError, ConnectionError):  # the driver has left
        return


def _picklable(error: BaseException) -> BaseException:
    """Return the error, with the traceback that pickling would lose as a note."""
    error.add_note("In a worker process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
