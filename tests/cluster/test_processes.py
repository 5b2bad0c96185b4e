from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest

from raymerge.cluster.errors import WorkerLostError
from raymerge.cluster.process_runner import ProcessRunner, StartMethod
from raymerge.cluster.runner import NUM_ATTEMPTS, Progress, Report, Runner
from tests.cluster.runner_contract import RunnerContract, even, nothing

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks only where it is safe")


class TestForked(RunnerContract):
    def make_runner(self, num_workers: int) -> Runner:
        return ProcessRunner(num_workers)


class TestFresh(RunnerContract):
    def make_runner(self, num_workers: int) -> Runner:
        return ProcessRunner(num_workers, StartMethod.FRESH)


class TestThreads(RunnerContract):
    """Two threads in each process."""

    def make_runner(self, num_workers: int) -> Runner:
        runner = ProcessRunner(-(-num_workers // 2), StartMethod.FRESH, num_threads=2)
        runner.num_slots = num_workers
        return runner


class OddError(Exception):
    """Cannot be rebuilt from its pickle."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


@pytest.fixture
def short_directory() -> Iterator[Path]:
    """A directory whose name leaves room for that of a socket."""
    with tempfile.TemporaryDirectory(prefix="t", dir="/tmp") as directory:
        yield Path(directory)


def own_pid(item: int, report: Report) -> int:
    return os.getpid()


def start_and_leave(parent: Path, is_killed: bool) -> subprocess.CompletedProcess[bytes]:
    """Start a fork server in a process of its own, which then ends or is killed; it prints where the socket was."""
    program = f"""
        import os, signal, time
        from pathlib import Path
        from raymerge.cluster import directory
        from raymerge.cluster.fork_server import start_fork_server
        directory._PARENT = Path({str(parent)!r})
        start_fork_server([])
        print(*Path({str(parent)!r}).rglob("listener-*"), flush=True)
        if {is_killed}:
            os.kill(os.getpid(), signal.SIGKILL)
    """
    temporary = parent / ("long" * 30)
    temporary.mkdir(exist_ok=True)
    environment = os.environ | {"TMPDIR": str(temporary)}
    return subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, stdout=subprocess.PIPE)


def test_the_socket_of_a_killed_run_is_deleted_by_the_next(short_directory: Path) -> None:
    killed = start_and_leave(short_directory, is_killed=True)
    (left,) = map(Path, killed.stdout.decode().split())
    assert killed.returncode == -signal.SIGKILL
    assert left.exists()
    done = start_and_leave(short_directory, is_killed=False)
    assert (done.returncode, len(done.stdout.split())) == (0, 1)
    assert [path.name for path in short_directory.rglob("*")] == ["long" * 30]


def kill_itself(item: int, report: Report) -> int:
    if item == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.01)
    return item


def raise_odd(item: int, report: Report) -> int:
    raise OddError("both", " parts")


def raise_value_error(item: int, report: Report) -> int:
    raise ValueError("no")


def report_much(item: int, report: Report) -> int:
    for _ in range(5000):
        report(Progress(read_nbytes=1))
    return item


@pytest.mark.parametrize("num_processes", [0, -1])
def test_a_runner_without_processes_would_lose_every_item(num_processes: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        ProcessRunner(num_processes)


def test_items_run_in_processes_of_their_own() -> None:
    assert os.getpid() not in set(ProcessRunner(2).run(own_pid, [1, 2, 3], even("abc"), nothing))


def test_forked_workers_have_the_items_already() -> None:
    items = [lambda k=k: k * k for k in range(5)]  # which cannot be pickled
    found = ProcessRunner(2).run(lambda item, report: item(), items, even(items), nothing)
    assert sorted(found) == [0, 1, 4, 9, 16]


def test_the_collector_of_forked_workers_leaves_out_what_they_inherit() -> None:
    (num_left_out,) = ProcessRunner(1).run(lambda item, report: gc.get_freeze_count(), [0], even([0]), nothing)
    assert num_left_out > 1000


def test_a_worker_that_dies_each_time_is_an_error_that_says_so() -> None:
    reasons: list[str] = []
    runner = ProcessRunner(2, on_retry=reasons.append)
    with pytest.raises(
        WorkerLostError, match=r"after 4 attempts, at last because its worker process was .* SIGKILL"
    ) as caught:
        list(runner.run(kill_itself, [1, 2, 3], even("abc"), nothing))
    assert "memory may have run out" in str(caught.value)
    assert str(caught.value).endswith("run the same command again, with fewer --workers or less --memory")
    assert reasons == ["its worker process was killed by SIGKILL"] * (NUM_ATTEMPTS - 1)
    assert not multiprocessing.active_children()


def die_at_first(item: int, report: Report, *, directory: Path) -> int:
    """Items 1 and 3 have their worker killed once, after it has reported."""
    report(Progress(read_nbytes=1))
    if item in (1, 3):
        with suppress(FileExistsError):
            (directory / str(item)).touch(exist_ok=False)
            time.sleep(0.2)
            os.kill(os.getpid(), signal.SIGKILL)
    return item


def die_in_a_message(item: int, report: Report, *, directory: Path) -> bytes:
    """Have the worker killed once while it sends a result that its driver does not take at once."""
    report(Progress(read_nbytes=1))
    with suppress(FileExistsError):
        (directory / str(item)).touch(exist_ok=False)
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()
        (directory / "pid").write_text(str(os.getpid()))
    return bytes(2**24)


def test_a_worker_killed_in_the_middle_of_a_message_is_lost(tmp_path: Path) -> None:
    reasons: list[str] = []
    runner = ProcessRunner(1, on_retry=reasons.append)
    work = partial(die_in_a_message, directory=tmp_path)

    def wait_for_its_end(progress: Progress) -> None:
        while not (own := tmp_path / "pid").exists() or is_running(int(own.read_text() or os.getpid())):
            time.sleep(0.01)

    results = runner.run(work, [1], even("a"), wait_for_its_end)
    assert [len(result) for result in results] == [2**24]
    assert reasons == ["its worker process was killed by SIGKILL"]


@pytest.mark.parametrize(
    ("start_method", "num_threads"), [(StartMethod.FORK, 1), (StartMethod.FRESH, 1), (StartMethod.FRESH, 2)]
)
def test_items_of_dead_workers_are_done_again(tmp_path: Path, start_method: StartMethod, num_threads: int) -> None:
    reasons: list[str] = []
    seen: list[int] = []
    runner = ProcessRunner(2, start_method, num_threads=num_threads, on_retry=reasons.append)
    work = partial(die_at_first, directory=tmp_path)
    results = runner.run(work, list(range(6)), even("abcdef"), lambda progress: seen.append(progress.read_nbytes))
    assert sorted(results) == list(range(6))
    assert len(reasons) == 2 if num_threads == 1 else 2 <= len(reasons) <= 4, "a process takes its threads along"
    assert sum(seen) == 6, "what the dead workers had reported is taken back"
    assert not multiprocessing.active_children()


def test_an_error_that_cannot_be_pickled_keeps_its_text() -> None:
    with pytest.raises(RuntimeError, match="both parts"):
        list(ProcessRunner(1).run(raise_odd, [1], even("a"), nothing))


def test_an_error_brings_its_traceback_along() -> None:
    with pytest.raises(ValueError, match="no") as caught:
        list(ProcessRunner(1).run(raise_value_error, [1], even("a"), nothing))
    assert "raise_value_error" in "".join(caught.value.__notes__)


def test_a_slow_driver_holds_workers_up_and_loses_nothing() -> None:
    seen = 0

    def count(progress: Progress) -> None:
        nonlocal seen
        seen += progress.read_nbytes

    for _ in ProcessRunner(2).run(report_much, [1, 2, 3], even("abc"), count):
        time.sleep(0.05)
    assert seen == 15000


def test_workers_end_with_a_killed_driver(tmp_path: Path) -> None:
    code = """
import os, sys, time
from pathlib import Path
from raymerge.cluster.process_runner import ProcessRunner, StartMethod
from raymerge.cluster.runner import Progress, Resources

def work(item, report):
    Path(sys.argv[1], str(os.getpid())).touch()
    time.sleep(60)

list(ProcessRunner(2).run(work, [1, 2], [Resources(mem_nbytes=1, cost=1)] * 2, lambda progress: None))
"""
    driver = subprocess.Popen([sys.executable, "-c", code, tmp_path])
    while len(list(tmp_path.iterdir())) < 2:
        assert driver.poll() is None
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    pids = [int(path.name) for path in tmp_path.iterdir()]
    while any(is_running(pid) for pid in pids):
        time.sleep(0.01)


def is_running(pid: int) -> bool:
    """A process that has ended may still be listed until its new parent has seen it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def own_variable(item: int, report: Report, *, directory: Path) -> tuple[str, int]:
    """Wait until three processes have an item, so that each of them has one."""
    (directory / str(os.getpid())).touch()
    while len(list(directory.iterdir())) < 3:
        time.sleep(0.01)
    return os.environ["OWN"], os.getpid()


def test_fresh_workers_have_variables_of_their_own(tmp_path: Path) -> None:
    runner = ProcessRunner(3, StartMethod.FRESH, environments=[{"OWN": "a"}, {"OWN": "b"}])
    found = set(runner.run(partial(own_variable, directory=tmp_path), list(range(9)), even(range(9)), nothing))
    assert sorted(own for own, _ in found) == ["a", "a", "b"]
    assert "OWN" not in os.environ


def tell_of_preparation(item: int, report: Report) -> tuple[int, str]:
    return os.getpid(), os.environ.get("PREPARED", "")


def prepare() -> None:
    os.environ["PREPARED"] = os.environ["OWN"]


def test_processes_hired_ahead_are_prepared_and_used_once() -> None:
    runner = ProcessRunner(
        2, StartMethod.FRESH, num_threads=2, environments=[{"OWN": "a"}, {"OWN": "b"}], prepare=prepare
    )
    runner.hire()
    hired = {process.pid for process in multiprocessing.active_children()}
    assert list(runner.run(own_pid, [], [], nothing)) == []
    first = dict(runner.run(tell_of_preparation, list(range(20)), even(range(20)), nothing))
    assert set(first) <= hired
    assert set(first.values()) <= {"a", "b"}
    second = set(runner.run(own_pid, [1], even("a"), nothing))
    assert not second & hired
    assert not multiprocessing.active_children()


def test_processes_hired_for_nothing_end() -> None:
    runner = ProcessRunner(2, StartMethod.FRESH, num_threads=2, prepare=partial(time.sleep, 600))
    runner.hire()
    assert len(multiprocessing.active_children()) == 2
    runner.close()
    assert not multiprocessing.active_children()
