"""Items that take far longer than their like get a twin: the first to finish counts, the other ends."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import ray

from raymerge.cluster.ray.actors import ActorRunner
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import RaySession, start_ray
from raymerge.cluster.runner import Progress, Report, Resources
from tests.cluster.ray.work import crawl_at_first, stop_at_first, wait_until_gone
from tests.cluster.runner_contract import even

pytestmark = pytest.mark.slow

TWIN = "it was slow (on {}), and was begun once more elsewhere"

COSTS = [Resources(mem_nbytes=1, cost=cost) for cost in (11, 10, 10)]
"""Of three items, the slow one first."""

MakeRunner = Callable[..., RayRunner]


@pytest.fixture(scope="module")
def session() -> Iterator[RaySession]:
    with start_ray(4, num_gpus=4) as session:
        yield session


@pytest.fixture(params=[RayRunner, partial(ActorRunner, num_sharing=1)], ids=["tasks", "actors"])
def make_runner(request: pytest.FixtureRequest, session: RaySession, monkeypatch: pytest.MonkeyPatch) -> MakeRunner:
    monkeypatch.setattr("raymerge.cluster.pace._LEAST_SECONDS", 1.0)
    made: MakeRunner = request.param
    return made


class Total:
    """Adds up what is told."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, progress: Progress) -> None:
        self.nbytes += progress.read_nbytes


def wait_until_free(session: RaySession) -> None:
    """Wait until no task or actor has a processor any more."""
    give_up = time.monotonic() + 120
    while ray.available_resources().get("CPU") != session.nodes[0].num_cpus:
        assert time.monotonic() < give_up, "Ray has something to do still"
        time.sleep(0.1)


def test_the_item_of_a_stopped_worker_is_done_by_another(
    make_runner: MakeRunner, session: RaySession, tmp_path: Path
) -> None:
    reasons: list[str] = []
    told = Total()
    items = list(range(6))
    runner = make_runner(4, on_retry=reasons.append)
    results = dict(runner.run(partial(stop_at_first, directory=tmp_path), items, even(items), told))
    stopped = int((tmp_path / "stopped").read_text())
    assert sorted(results) == items
    assert results[0] != stopped
    assert told.nbytes == 60, "what was told twice counts once"
    assert reasons == [TWIN.format(session.host)]
    wait_until_gone(stopped)
    wait_until_free(session)


def test_a_slow_worker_ends_when_its_twin_is_done(make_runner: MakeRunner, session: RaySession, tmp_path: Path) -> None:
    told = Total()
    work = partial(crawl_at_first, directory=tmp_path)
    # no other item is in work when it turns out to be slow, and it never falls silent
    assert sorted(make_runner(2).run(work, [0, 1], COSTS[:2], told)) == ["0 fast", "1 fast"]
    assert told.nbytes == 200
    assert (tmp_path / "slow-0-ended").exists(), "it could abort what it had begun to write"
    wait_until_free(session)


@pytest.mark.parametrize("end", ["hold", "fail"])
def test_a_slow_worker_may_be_first_or_the_only_one(
    make_runner: MakeRunner, session: RaySession, tmp_path: Path, end: str
) -> None:
    (tmp_path / f"fast-{end}").touch()

    def tell(reason: str) -> None:
        reasons.append(reason)
        (tmp_path / "slow-hurry").touch()

    told, reasons = Total(), list[str]()
    work = partial(crawl_at_first, directory=tmp_path)
    results = make_runner(2, on_retry=tell).run(work, [0, 1, 2], COSTS, told)
    assert sorted(results) == ["0 slow", "1 fast", "2 fast"]
    assert reasons == [TWIN.format(session.host)]
    assert told.nbytes == 300
    wait_until_free(session)


def test_an_item_fails_when_both_have(make_runner: MakeRunner, session: RaySession, tmp_path: Path) -> None:
    (tmp_path / "fast-hold").touch()

    def tell(reason: str) -> None:
        (tmp_path / "slow-fail").touch()

    def count(progress: Progress) -> None:
        if (tmp_path / "slow-0-ended").exists():
            (tmp_path / "fast-fail").touch()

    work = partial(crawl_at_first, directory=tmp_path)
    with pytest.raises(OSError, match="the fast one has failed"):
        list(make_runner(2, on_retry=tell).run(work, [0, 1, 2], COSTS, count))
    wait_until_free(session)


def fail_beside_a_stopped_one(item: int, report: Report, *, directory: Path) -> int:
    report(Progress(read_nbytes=1))
    if item == 0:
        (directory / "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    while not (directory / "stopped").exists():
        time.sleep(0.01)
    raise OSError("no way")


def test_an_error_is_raised_though_a_worker_is_stopped(
    make_runner: MakeRunner, session: RaySession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("raymerge.cluster.ray.silence.END_SECONDS", 1.0)
    work = partial(fail_beside_a_stopped_one, directory=tmp_path)
    with pytest.raises(OSError, match="no way"):
        list(make_runner(2).run(work, [0, 1], even("ab"), Total()))
    wait_until_gone(int((tmp_path / "stopped").read_text()))
    wait_until_free(session)
