"""The books of a run: whose progress counts where two attempts at an item are in work."""

from __future__ import annotations

import time

import pytest

from raymerge.cluster.ray.attempt import Attempt
from raymerge.cluster.ray.ledger import Ledger
from raymerge.cluster.ray.task import Begun
from raymerge.cluster.runner import Progress, Resources


class Run:
    """Two items of a hundred bytes: the first is finished, and the other takes for ever."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.ledger = Ledger([Attempt(0, 1), Attempt(1, 1)], [Resources(1, cost=1)] * 2, 2, self.count)
        for name in ("done", "first"):
            attempt = self.ledger.take()
            assert attempt
            attempt.begun, attempt.began_at = Begun("node", "host"), time.monotonic() - 1
            self.ledger.running[name] = attempt
            self.ledger.count(attempt, Progress(read_nbytes=100 if name == "done" else 40))
        assert self.ledger.find_stragglers() == []
        assert self.ledger.finish("done") is None
        self.first = self.ledger.running["first"]
        self.first.began_at = self.first.heard_at = time.monotonic() - 100

    def count(self, progress: Progress) -> None:
        self.nbytes += progress.read_nbytes


@pytest.fixture
def run() -> Run:
    """A run with a twin that has told of 70 bytes."""
    run = Run()
    assert run.ledger.find_stragglers() == ["first"]
    assert run.nbytes == 140
    assert run.ledger.take_twin("first")
    twin = run.ledger.running["twin"] = run.first.make_next()
    assert twin.avoided == ("node",)
    run.ledger.count(twin, Progress(read_nbytes=70))
    run.ledger.count(run.first, Progress(read_nbytes=10))
    assert run.nbytes == 170
    return run


def test_an_item_has_one_twin_at_most(run: Run) -> None:
    twin = run.ledger.running["twin"]
    twin.begun, twin.began_at, twin.heard_at = run.first.begun, run.first.began_at, run.first.heard_at
    assert run.ledger.find_stragglers() == []
    assert run.ledger.drop("twin") is run.first
    assert run.nbytes == 150
    assert run.ledger.find_stragglers() == []


@pytest.mark.parametrize(("winner", "loser", "nbytes"), [("first", "twin", 150), ("twin", "first", 170)])
def test_progress_of_the_first_to_finish_counts(run: Run, winner: str, loser: str, nbytes: int) -> None:
    beaten = run.ledger.finish(winner)
    assert beaten is run.ledger.running[loser]
    assert beaten.is_beaten
    run.ledger.count(beaten, Progress(read_nbytes=5))
    assert run.nbytes == nbytes
    assert run.ledger.drop(loser) is None
    assert run.nbytes == nbytes
    assert not run.ledger


def test_progress_of_both_is_taken_back_where_both_fail(run: Run) -> None:
    assert run.ledger.drop("first") is run.ledger.running["twin"]
    assert run.nbytes == 170
    assert run.ledger.drop("twin") is None
    assert run.nbytes == 100
    assert not run.ledger
    run.ledger.repeat(Attempt(1, 1, number=2))
    assert run.ledger.take() == Attempt(1, 1, number=2, heard_at=run.ledger._attempts[1].heard_at)


def test_an_attempt_that_has_told_of_all_and_waits_is_slow_though_it_reports() -> None:
    run = Run()
    run.first.heard_at = time.monotonic()
    run.ledger.count(run.first, Progress(written_nbytes=60))
    assert run.ledger.find_stragglers() == [], "it is about to end"
    run.first.advanced_at -= 100
    run.ledger.count(run.first, Progress())
    assert run.ledger.find_stragglers() == ["first"]


def test_no_twins_where_none_are_wanted() -> None:
    attempts, resources = [Attempt(0, 1), Attempt(1, 1)], [Resources(1, cost=1)] * 2
    for has_twins in (True, False):
        ledger = Ledger(attempts, resources, 3, lambda progress: None, has_twins=has_twins)
        assert [ledger.take(), ledger.take()] == attempts
        assert ledger.has_spare == has_twins


def test_notes_are_told_once_and_not_kept() -> None:
    told: list[object] = []
    ledger = Ledger([Attempt(0, 1)], [Resources(1, cost=1)], 1, lambda progress: told.extend(progress.notes))
    attempt = ledger.take()
    assert attempt
    ledger.running["first"] = attempt
    ledger.count(attempt, Progress(notes=("a",)) + Progress(read_nbytes=2, notes=("b",)))
    ledger.drop("first")
    assert told == ["a", "b"]
    assert attempt.told == Progress(read_nbytes=2)
