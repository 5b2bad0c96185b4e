"""What every runner promises; an implementation is tested by a subclass with a fixture."""

from __future__ import annotations

import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import uuid4

import pytest

from raymerge.cluster.runner import Progress, Report, Resources, Runner

# Work is written so that it runs anywhere: picklable functions of picklable items, which tell of themselves in files.


class WorkError(Exception):
    """Raised by work; goes through pickle."""


def square(item: int, report: Report) -> int:
    report(Progress(read_nbytes=item, written_nbytes=2 * item))
    return item * item


def wait_for_the_other(item: int, report: Report, *, directory: Path) -> int:
    """Item 0 goes on when the other's result has been seen."""
    while item == 0 and not (directory / "seen").exists():
        time.sleep(0.01)
    return item


class Copy:
    """Work that tells its copies apart."""

    def __init__(self) -> None:
        self.number = uuid4().int

    def __reduce__(self) -> tuple[type[Copy], tuple[()]]:
        return Copy, ()

    def __call__(self, item: int, report: Report) -> tuple[int, int]:
        return os.getpid(), self.number


def log_start(item: int, report: Report, *, log: Path) -> int:
    with log.open("a") as file:
        file.write(f"{item}\n")
    time.sleep(0.01)
    return item


def count_running(item: int, report: Report, *, directory: Path, expected: int) -> int:
    """Return how many are at work together with this one; the first wait for as many as are expected, for a while."""
    own = directory / f"running-{item}"
    own.touch()
    give_up = time.monotonic() + 120
    while not (directory / "met").exists() and time.monotonic() < give_up:
        if len(list(directory.glob("running-*"))) >= expected:
            (directory / "met").touch()
        time.sleep(0.001)
    time.sleep(0.02)
    num_running = len(list(directory.glob("running-*")))
    own.unlink()
    return num_running


def fail_on_three(item: int, report: Report) -> int:
    if item == 3:
        raise WorkError(f"item {item} is bad")
    time.sleep(0.01)
    return item


def work_until_stopped(item: int, report: Report, *, directory: Path) -> int:
    """Item 0 fails or returns when the others are at work; these go on until a report ends them."""
    if item == 0:
        (directory / "began-0").touch()
        while len(list(directory.glob("began-*"))) < 2:
            time.sleep(0.001)
        if (directory / "fail").exists():
            raise WorkError("the first error")
        return 0
    began = directory / f"began-{item}"
    try:
        began.touch()
        while True:
            time.sleep(0.002)
            report(Progress())
    finally:
        if began.exists():
            (directory / f"ended-{item}").touch()


def add_up_slots(item: tuple[str, int], report: Report, *, directory: Path) -> int:
    """Return how many slots the items have that run now."""
    name, num_slots = item
    mark = directory / f"{name}-{num_slots}"
    mark.touch()
    time.sleep(0.05)
    total = sum(int(path.name[2:]) for path in directory.iterdir())
    mark.unlink()
    return total


def nothing(progress: Progress) -> None:
    pass


def even(items: Sequence[object]) -> list[Resources]:
    return [Resources(mem_nbytes=1, cost=1) for _ in items]


class RunnerContract(ABC):
    """Subclass it as `TestSomething`, and say how to make the runner."""

    @abstractmethod
    def make_runner(self, num_workers: int) -> Runner:
        """Return a runner that has at most so many items in work at once."""

    @pytest.fixture(autouse=True)
    def _no_thread_is_left(self) -> Iterator[None]:
        before = set(threading.enumerate())
        yield
        assert set(threading.enumerate()) <= before

    @pytest.mark.parametrize("num_workers", [1, 2, 5])
    @pytest.mark.parametrize("num_items", [0, 1, 20])
    def test_every_result_comes_once(self, num_workers: int, num_items: int) -> None:
        items = list(range(num_items))
        results = list(self.make_runner(num_workers).run(square, items, even(items), nothing))
        assert sorted(results) == [item * item for item in items]

    def test_equal_items_are_items_of_their_own(self) -> None:
        assert list(self.make_runner(2).run(square, [3, 3, 3], even("abc"), nothing)) == [9, 9, 9]

    def test_a_process_gets_one_copy_of_the_work_for_all_items(self) -> None:
        items = list(range(12))
        results = list(self.make_runner(2).run(Copy(), items, even(items), nothing))
        assert len({pid for pid, _ in results}) == len(set(results)) < len(items)

    def test_a_runner_can_be_used_again(self) -> None:
        runner = self.make_runner(2)
        for items in ([1, 2], [3], []):
            assert sorted(runner.run(square, items, even(items), nothing)) == [item**2 for item in items]

    def test_results_come_as_they_are_ready(self, tmp_path: Path) -> None:
        items = [0, 1]
        results = []
        for result in self.make_runner(2).run(
            partial(wait_for_the_other, directory=tmp_path), items, even(items), nothing
        ):
            results.append(result)
            (tmp_path / "seen").touch()
        assert results == [1, 0]

    def test_the_costliest_start_first(self, tmp_path: Path) -> None:
        items, costs = [10, 11, 12, 13, 14], [5, 50, 5, 70, 6]
        resources = [Resources(mem_nbytes=1, cost=cost) for cost in costs]
        log = tmp_path / "log"
        list(self.make_runner(1).run(partial(log_start, log=log), items, resources, nothing))
        assert [int(line) for line in log.read_text().split()] == [13, 11, 14, 10, 12]

    @pytest.mark.parametrize("num_workers", [1, 3])
    def test_no_more_at_once_than_allowed(self, num_workers: int, tmp_path: Path) -> None:
        items = list(range(9))
        work = partial(count_running, directory=tmp_path, expected=num_workers)
        counts = list(self.make_runner(num_workers).run(work, items, even(items), nothing))
        assert max(counts) == num_workers

    def test_no_more_slots_are_taken_than_there_are(self, tmp_path: Path) -> None:
        items = [("a", 1), ("b", 1), ("c", 3), ("d", 1), ("e", 3), ("f", 1)]
        resources = [Resources(mem_nbytes=1, cost=1, num_slots=num_slots) for _, num_slots in items]
        work = partial(add_up_slots, directory=tmp_path)
        sums = list(self.make_runner(4).run(work, items, resources, nothing))
        assert len(sums) == len(items)
        assert 3 <= max(sums) <= 4

    def test_an_item_of_more_slots_than_there_are_gets_all(self) -> None:
        resources = [Resources(mem_nbytes=1, cost=1, num_slots=9)] * 2
        assert sorted(self.make_runner(2).run(square, [2, 3], resources, nothing)) == [4, 9]

    def test_progress_adds_up_and_arrives_in_the_drivers_thread(self) -> None:
        seen: list[tuple[Progress, threading.Thread]] = []
        items = list(range(10))
        list(
            self.make_runner(3).run(
                square, items, even(items), lambda progress: seen.append((progress, threading.current_thread()))
            )
        )
        assert sum(progress.read_nbytes for progress, _ in seen) == 45
        assert sum(progress.written_nbytes for progress, _ in seen) == 90
        assert {thread for _, thread in seen} == {threading.current_thread()}

    @pytest.mark.parametrize("num_workers", [1, 2])
    def test_an_error_of_the_work_is_raised(self, num_workers: int) -> None:
        items = [1, 2, 3, 4]
        with pytest.raises(WorkError, match="item 3 is bad"):
            list(self.make_runner(num_workers).run(fail_on_three, items, even(items), nothing))

    def test_results_before_an_error_are_not_lost(self) -> None:
        items = [1, 2, 3]
        results = self.make_runner(1).run(fail_on_three, items, even(items), nothing)
        assert [next(results), next(results)] == [1, 2]
        with pytest.raises(WorkError):
            next(results)

    def test_nothing_starts_after_an_error(self, tmp_path: Path) -> None:
        (tmp_path / "fail").touch()
        items = list(range(8))
        with pytest.raises(WorkError, match="the first error"):
            list(self.make_runner(2).run(partial(work_until_stopped, directory=tmp_path), items, even(items), nothing))
        began, ended = ({path.name[6:] for path in tmp_path.glob(f"{what}-*")} for what in ("began", "ended"))
        assert began == {"0", "1"}
        assert ended == {"1"}, "the other item had ended before the error was raised"

    def test_leaving_early_ends_the_items_in_work(self, tmp_path: Path) -> None:
        items = list(range(8))
        results = self.make_runner(2).run(partial(work_until_stopped, directory=tmp_path), items, even(items), nothing)
        assert next(results) == 0
        assert isinstance(results, Generator)
        results.close()
        began, ended = ({path.name[6:] for path in tmp_path.glob(f"{what}-*")} for what in ("began", "ended"))
        assert ended == began - {"0"}
        assert len(began) <= 3

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_an_exception_in_the_loop_ends_the_items_in_work(self, error: type[BaseException], tmp_path: Path) -> None:
        def consume() -> None:
            items = list(range(8))
            work = partial(work_until_stopped, directory=tmp_path)
            for _ in self.make_runner(2).run(work, items, even(items), nothing):
                raise error

        with pytest.raises(error):
            consume()
        began, ended = ({path.name[6:] for path in tmp_path.glob(f"{what}-*")} for what in ("began", "ended"))
        assert ended == began - {"0"}

    @pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
    def test_an_exception_while_progress_is_told_ends_the_items_in_work(
        self, error: type[BaseException], tmp_path: Path
    ) -> None:
        def refuse(progress: Progress) -> None:
            raise error

        items = [1, 2, 3, 4]
        work = partial(work_until_stopped, directory=tmp_path)
        with pytest.raises(error):
            list(self.make_runner(2).run(work, items, even(items), refuse))
        began, ended = ({path.name[6:] for path in tmp_path.glob(f"{what}-*")} for what in ("began", "ended"))
        assert ended == began
        assert len(began) <= 2
