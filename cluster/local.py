"""Runs work in this process, on a few threads."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence

from raymerge.cluster.errors import StoppedError
from raymerge.cluster.outcome import Done, Failed
from raymerge.cluster.runner import Item, Progress, Report, Resources, Result, Runner, Work
from raymerge.cluster.waiting import Waiting


class _Ended:
    """A thread has no more work."""


class LocalRunner(Runner):
    """A few threads, each running one item after the other, the costliest items first.

    Right for work that leaves the interpreter lock alone most of the time, as torch, hashing and I/O do.
    """

    def __init__(self, num_threads: int) -> None:
        if num_threads < 1:
            raise ValueError(f"{num_threads} threads are given, at least 1 is needed")
        self.num_threads = self.num_per_process = num_threads

    def run(
        self,
        work: Work[Item, Result],
        items: Sequence[Item],
        resources: Sequence[Resources],
        on_progress: Report,
    ) -> Iterator[Result]:
        """Yield each item's result as it comes; see `Runner.run`."""
        waiting = Waiting(resources, self.num_threads)
        may_fit = threading.Condition()
        events: queue.SimpleQueue[Progress | Done | Failed | _Ended] = queue.SimpleQueue()
        stop = threading.Event()

        def report(progress: Progress) -> None:
            if stop.is_set():
                raise StoppedError("stopped")
            events.put(progress)

        def work_off() -> None:
            position = None
            while not stop.is_set():
                with may_fit:
                    if position is not None:
                        waiting.release(position)
                        may_fit.notify_all()
                    while (position := waiting.take()) is None and waiting:
                        may_fit.wait()
                if position is None:
                    break
                try:
                    events.put(Done(work(items[position], report)))
                except BaseException as error:  # raised in the driver
                    events.put(Failed(error))
                    break
            with may_fit:
                if stop.is_set() or position is not None:  # the others have nothing to wait for
                    waiting.clear()
                may_fit.notify_all()
            events.put(_Ended())

        threads = [
            threading.Thread(target=work_off, name=f"worker-{i}", daemon=True)
            for i in range(min(self.num_threads, len(items)))
        ]
        error: BaseException | None = None
        num_running = len(threads)
        try:
            for thread in threads:
                thread.start()
            while num_running:
                event = events.get()
                if isinstance(event, Progress):
                    on_progress(event)
                elif isinstance(event, Done):
                    yield event.result
                elif isinstance(event, Failed):
                    stop.set()
                    error = error or event.error
                else:
                    num_running -= 1
        finally:
            stop.set()
            for thread in threads:
                if thread.is_alive():
                    thread.join()
        if error is not None:
            raise error
