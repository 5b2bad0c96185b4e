from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Generator

import pytest

from raymerge.cluster.errors import StoppedError
from raymerge.cluster.local import LocalRunner
from raymerge.cluster.runner import Progress, Report, Runner
from tests.cluster.runner_contract import RunnerContract, even, nothing, square


class TestLocalRunner(RunnerContract):
    def make_runner(self, num_workers: int) -> Runner:
        return LocalRunner(num_workers)


@pytest.mark.parametrize("num_threads", [0, -1])
def test_a_runner_without_threads_would_lose_every_item(num_threads: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        LocalRunner(num_threads)


def test_nothing_starts_before_the_first_result_is_asked_for() -> None:
    started = []

    def work(item: int, report: Report) -> int:
        started.append(item)
        return item

    results = LocalRunner(1).run(work, [1], even("a"), nothing)
    assert not started
    assert list(results) == [1]


def test_no_more_threads_than_items() -> None:
    num_threads = threading.active_count()
    seen = []

    def work(item: int, report: Report) -> int:
        seen.append(threading.active_count() - num_threads)
        return item

    list(LocalRunner(8).run(work, [1, 2], even("ab"), nothing))
    assert max(seen) <= 2


def test_a_stopped_item_is_told_so() -> None:
    told: list[BaseException] = []
    began = threading.Event()

    def work(item: int, report: Report) -> int:
        if item == 0:
            began.wait()
            return 0
        began.set()
        try:
            while True:
                time.sleep(0.001)
                report(Progress())
        except StoppedError as error:
            told.append(error)
            raise

    results = LocalRunner(2).run(work, [0, 1], even("ab"), nothing)
    assert next(results) == 0
    assert isinstance(results, Generator)
    results.close()
    assert len(told) == 1


def test_the_first_error_wins() -> None:
    barrier, first = threading.Barrier(2), list[threading.Thread]()

    def work(item: int, report: Report) -> int:
        if item == 0:
            first.append(threading.current_thread())
        barrier.wait()
        if item == 1:
            first[0].join()
        raise ValueError(f"item {item}")

    with pytest.raises(ValueError, match="item 0"):
        list(LocalRunner(2).run(work, [0, 1], even("ab"), nothing))


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="needs a signal that nobody else uses")
def test_an_interrupt_reaches_the_driver_while_it_waits() -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    def work(item: int, report: Report) -> int:
        if item == 1:
            os.kill(os.getpid(), signal.SIGALRM)
        while True:
            time.sleep(0.01)
            report(Progress())

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(LocalRunner(2).run(work, [1, 2], even("ab"), nothing))
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]


def test_threads_that_cannot_be_started_leave_no_others_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def refuse_the_second(thread: threading.Thread) -> None:
        if thread.name == "worker-1":
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", refuse_the_second)
    with pytest.raises(RuntimeError, match="can't start"):
        list(LocalRunner(3).run(square, list(range(100)), even(range(100)), nothing))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("worker-")]
