"""Work on Ray: the contract of runners, and workers that die, hang, or cannot do what they are given."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from raymerge.cluster.errors import ResourceError, TaskFailedError, WorkerLostError
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import RaySession, start_ray
from raymerge.cluster.runner import NUM_ATTEMPTS, Progress, Report, Resources, Runner
from tests.cluster.ray.work import hang_at_first, wait_until_gone
from tests.cluster.runner_contract import RunnerContract, even, nothing, square


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with start_ray(5) as session:
        yield session


class TestRay(RunnerContract):
    @pytest.fixture(autouse=True)
    def _session(self, session: RaySession) -> None:
        pass

    def make_runner(self, num_workers: int) -> Runner:
        return RayRunner(num_workers)


def die_at_first(item: int, report: Report, *, directory: Path) -> int:
    """Item 1 has its worker killed once, after it has reported; item 2 every time."""
    mark = directory / f"{item}-{time.monotonic_ns()}"
    mark.touch()
    report(Progress(read_nbytes=1))
    if item == 2 or (item == 1 and len(list(directory.glob("1-*"))) == 1):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_items_of_dead_workers_are_done_again(session: RaySession, tmp_path: Path) -> None:
    reasons: list[str] = []
    seen = 0

    def count(progress: Progress) -> None:
        nonlocal seen
        seen += progress.read_nbytes

    runner = RayRunner(2, on_retry=reasons.append)
    work = partial(die_at_first, directory=tmp_path)
    assert sorted(runner.run(work, [0, 1, 3], even("abc"), count)) == [0, 1, 3]
    assert reasons == [f"its worker died (on {session.host})"]
    assert seen == 3, "what the dead worker had reported is taken back"
    with pytest.raises(WorkerLostError, match=f"after {NUM_ATTEMPTS} attempts, at last because its worker died"):
        list(runner.run(work, [2], even("a"), count))
    assert len(list(tmp_path.glob("2-*"))) == NUM_ATTEMPTS


@pytest.mark.slow
def test_what_is_tried_in_vain_may_have_a_result(session: RaySession, tmp_path: Path) -> None:
    runner = RayRunner(2, on_giving_up=lambda item, error: (item, str(error).partition(",")[0]))
    found = list(runner.run(partial(die_at_first, directory=tmp_path), [0, 2, 3], even("abc"), nothing))
    assert sorted(found, key=str) == [(1, f"gave up an item after {NUM_ATTEMPTS} attempts"), 0, 3]


@pytest.mark.slow
def test_an_item_that_hangs_is_done_again(session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymerge.cluster.ray.silence.HANG_SECONDS", 3.0)
    reasons: list[str] = []
    seen: list[Progress] = []
    runner = RayRunner(2, on_retry=reasons.append)
    assert sorted(runner.run(partial(hang_at_first, directory=tmp_path), [0, 1, 2], even("abc"), seen.append)) == [
        0,
        1,
        2,
    ]
    assert reasons == [f"it had reported nothing for 3 s (on {session.host})"]
    assert sum(progress.read_nbytes for progress in seen) == 3
    wait_until_gone(int((tmp_path / "hung").read_text()))


def need_a_module(item: int, report: Report) -> int:
    import no_such_module  # type: ignore[import-not-found]  # noqa: F401

    return item


def test_what_a_worker_lacks_is_named(session: RaySession) -> None:
    with pytest.raises(TaskFailedError, match="no_such_module is not installed on a machine of the cluster"):
        list(RayRunner(1).run(need_a_module, [0], even("a"), nothing))


def test_what_no_node_has_is_refused_at_once(session: RaySession) -> None:
    most = session.nodes[0].mem_nbytes
    with pytest.raises(ResourceError, match=rf"no node of the cluster has more than {most:,} to offer; make items"):
        list(RayRunner(1).run(square, [0], [Resources(mem_nbytes=most, cost=1)], nothing))
    with pytest.raises(ResourceError, match="no node of the cluster has more than 0"):
        list(RayRunner(1, num_cpus=6).run(square, [0], even("a"), nothing))


class NotThere:
    """Work that workers cannot import."""

    def __reduce__(self) -> tuple[Any, ...]:
        return __import__, ("no_such_module",)

    def __call__(self, item: int, report: Report) -> int:
        return item


def test_what_workers_cannot_run_is_explained(session: RaySession) -> None:
    with pytest.raises(TaskFailedError, match=r"no_such_module.*same versions of Python and Ray"):
        list(RayRunner(1).run(NotThere(), [0], even("a"), nothing))
