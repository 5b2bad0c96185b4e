"""Work on GPUs that Ray believes in: the contract of runners, who gets which GPU, and what is done again."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from raymerge.cluster.errors import ResourceError, WorkerLostError
from raymerge.cluster.ray.actors import ActorRunner
from raymerge.cluster.ray.session import RaySession, start_ray
from raymerge.cluster.runner import NUM_ATTEMPTS, Progress, Report, Resources, Runner
from tests.cluster.ray.work import hang_at_first, wait_until_gone
from tests.cluster.runner_contract import RunnerContract, even, nothing, square

pytestmark = pytest.mark.slow  # a process for each actor


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with start_ray(5, num_gpus=2) as session:
        yield session


@pytest.fixture(autouse=True)
def _session(session: RaySession) -> None:
    pass


class TestActors(RunnerContract):
    def make_runner(self, num_workers: int) -> Runner:
        return ActorRunner(num_workers, num_sharing=3)


def where(item: int, report: Report) -> tuple[str, int]:
    time.sleep(0.2)
    return os.environ["CUDA_VISIBLE_DEVICES"], os.getpid()


def test_each_actor_keeps_its_gpu_and_as_many_share_one_as_the_plan_says() -> None:
    places = list(ActorRunner(4, num_sharing=2).run(where, list(range(12)), even(range(12)), nothing))
    gpus = {pid: gpu for gpu, pid in places}
    assert set(places) == {(gpu, pid) for pid, gpu in gpus.items()}
    assert sorted(gpus.values()) == ["0", "0", "1", "1"]


def test_no_more_actors_than_there_is_room_for(session: RaySession) -> None:
    gpus = set(ActorRunner(5, num_sharing=1).run(where, list(range(6)), even(range(6)), nothing))
    assert len(gpus) == 2
    half = Resources(mem_nbytes=session.nodes[0].mem_nbytes // 2, cost=1)
    assert len(set(ActorRunner(5, num_sharing=2).run(where, [0, 1, 2], [half] * 3, nothing))) == 1


def die_at_first(item: int, report: Report, *, directory: Path) -> int:
    """Item 1 has its worker killed once, after it has reported; item 2 every time."""
    (directory / f"{item}-{time.monotonic_ns()}").touch()
    report(Progress(read_nbytes=1))
    if item == 2 or (item == 1 and len(list(directory.glob("1-*"))) == 1):
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_items_of_dead_actors_are_done_again(tmp_path: Path) -> None:
    reasons: list[str] = []
    seen = 0

    def count(progress: Progress) -> None:
        nonlocal seen
        seen += progress.read_nbytes

    runner = ActorRunner(2, num_sharing=1, on_retry=reasons.append)
    work = partial(die_at_first, directory=tmp_path)
    assert sorted(runner.run(work, [0, 1, 3, 4], even("abcd"), count)) == [0, 1, 3, 4]
    assert [reason.partition(" (on ")[0] for reason in reasons] == ["its worker died"]
    assert seen == 4, "what the dead worker had reported is taken back"
    with pytest.raises(WorkerLostError, match=f"after {NUM_ATTEMPTS} attempts, at last because its worker died"):
        list(runner.run(work, [2], even("a"), count))
    assert len(list(tmp_path.glob("2-*"))) == NUM_ATTEMPTS


def test_an_item_that_hangs_is_done_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("raymerge.cluster.ray.silence.HANG_SECONDS", 3.0)
    reasons: list[str] = []
    runner = ActorRunner(2, num_sharing=1, on_retry=reasons.append)
    work = partial(hang_at_first, directory=tmp_path)
    assert sorted(runner.run(work, [0, 1, 2], even("abc"), nothing)) == [0, 1, 2]
    assert [reason.partition(" (on ")[0] for reason in reasons] == ["it had reported nothing for 3 s"]
    wait_until_gone(int((tmp_path / "hung").read_text()))


def test_what_no_node_with_a_gpu_has_is_refused_at_once(session: RaySession) -> None:
    most = session.nodes[0].mem_nbytes
    with pytest.raises(ResourceError, match=rf"no node of the cluster with a GPU has more than {most:,} to offer"):
        list(ActorRunner(1, num_sharing=1).run(square, [0], [Resources(mem_nbytes=most, cost=1)], nothing))
