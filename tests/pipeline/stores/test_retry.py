"""Trying again, by a clock that moves only when somebody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from raymerge.pipeline.errors import FetchError
from raymerge.pipeline.stores import retry as module
from raymerge.pipeline.stores.retry import (
    FIRST_SECONDS,
    MAX_RATE_LIMIT_SECONDS,
    PATIENCE_SECONDS,
    Fault,
    FaultLog,
    Patience,
    one_line,
    retry,
)

STORE = "s3://bucket"
DOWN = Fault("503 SlowDown")
GONE = Fault("connection reset")


@dataclass
class Clock:
    """Stands in for the module `time`."""

    now: float = 1000.0
    waits: list[float] = field(default_factory=list)

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(module, "time", clock)
    return clock


@pytest.fixture
def faults() -> FaultLog:
    return FaultLog()


def fail_until_given_up(patience: Patience, fault: Fault, *, at_most: int = 1000) -> None:
    for _ in range(at_most):
        if not patience.failed(fault):
            return
    pytest.fail("it never gave up")


def call(faults: FaultLog, *outcomes: Fault | Exception | str) -> tuple[Callable[[], str], list[str]]:
    """Return something to retry that has these outcomes one after the other, and the messages that it gives up with."""
    left = list(outcomes)
    given_up: list[str] = []

    def attempt() -> str:
        outcome = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(outcome, Fault):
            raise ConnectionError(outcome.what)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def give_up(error: Exception, how: str) -> Exception:
        given_up.append(how)
        return FetchError(f"{one_line(error)}: {how}")

    def run() -> str:
        return retry(
            attempt,
            faults=faults,
            store=STORE,
            operation="GET",
            classify=lambda error: Fault(str(error)) if isinstance(error, ConnectionError) else None,
            give_up=give_up,
        )

    return run, given_up


def test_what_works_is_done_once(clock: Clock, faults: FaultLog) -> None:
    run, _ = call(faults, "first", "second")
    assert run() == "first"
    assert clock.waits == []
    assert faults.drain() == ()


def test_faults_are_got_over_and_counted_by_name(clock: Clock, faults: FaultLog) -> None:
    run, _ = call(faults, DOWN, GONE, DOWN, "done")
    assert run() == "done"
    assert faults.drain() == ((f"{STORE}: GET: 503 SlowDown", 2), (f"{STORE}: GET: connection reset", 1))
    assert faults.drain() == ()
    assert len(clock.waits) == 3


def test_what_is_no_fault_is_raised_as_it_is(clock: Clock, faults: FaultLog) -> None:
    error = PermissionError("403")
    run, given_up = call(faults, GONE, error)
    with pytest.raises(PermissionError) as caught:
        run()
    assert caught.value is error
    assert given_up == []
    assert len(clock.waits) == 1


def test_giving_up_says_how_often_and_how_long_it_was_tried(clock: Clock, faults: FaultLog) -> None:
    run, given_up = call(faults, GONE)
    with pytest.raises(FetchError, match=r"^connection reset: gave up after \d+ attempts in \d+ s$") as caught:
        run()
    assert caught.value.__cause__ is None
    ((name, count),) = faults.drain()
    assert name == f"{STORE}: GET: connection reset"
    assert given_up == [f"gave up after {count} attempts in {sum(clock.waits):.0f} s"]


def test_waits_grow_and_half_of_each_is_random(clock: Clock, faults: FaultLog) -> None:
    faults.note_answer(STORE)
    for _ in range(20):
        fail_until_given_up(Patience(faults, STORE, "GET"), GONE)
    firsts = [wait for wait in clock.waits if wait <= 0.1]
    assert len(firsts) == 20
    assert all(0.05 <= wait <= 8 for wait in clock.waits)
    assert len(set(firsts)) > 10
    one = Patience(faults, STORE, "GET")
    clock.waits.clear()
    fail_until_given_up(one, GONE)
    for number, wait in enumerate(clock.waits):
        full = min(8.0, 0.1 * 2**number)
        assert full / 2 <= wait <= full


@pytest.mark.parametrize(("has_answered", "seconds"), [(True, PATIENCE_SECONDS), (False, FIRST_SECONDS)])
def test_a_store_that_never_answered_is_given_less_time(
    has_answered: bool, seconds: float, clock: Clock, faults: FaultLog
) -> None:
    if has_answered:
        Patience(faults, STORE, "HEAD").succeeded()
    begin = clock.now
    fail_until_given_up(Patience(faults, STORE, "GET"), GONE)
    assert seconds - 8 <= clock.now - begin <= seconds


def test_a_refusal_is_an_answer_and_each_store_is_known_by_itself(clock: Clock, faults: FaultLog) -> None:
    Patience(faults, STORE, "GET").failed(DOWN)
    assert faults.has_answered(STORE)
    assert not faults.has_answered("s3://other")
    Patience(faults, "s3://other", "GET").failed(GONE)
    assert not faults.has_answered("s3://other")


def test_progress_starts_patience_anew(clock: Clock, faults: FaultLog) -> None:
    patience = Patience(faults, STORE, "GET")
    for _ in range(20):
        for _ in range(5):
            assert patience.failed(DOWN)
        patience.succeeded()
    assert sum(clock.waits) > PATIENCE_SECONDS
    clock.waits.clear()
    assert patience.failed(DOWN)
    assert clock.waits[0] <= 0.1
    assert patience.num_attempts == 101


def test_a_time_of_its_own(clock: Clock, faults: FaultLog) -> None:
    begin = clock.now
    fail_until_given_up(Patience(faults, STORE, "GET", 3.0), DOWN)
    assert clock.now - begin <= 3


def test_a_long_call_counts_from_its_start(clock: Clock, faults: FaultLog) -> None:
    faults.note_answer(STORE)
    patience = Patience(faults, STORE, "GET", 3.0)
    clock.now += 100  # one call that hung, the first of its kind
    assert patience.failed(GONE) is False


def test_what_a_store_asks_for_is_waited_for(clock: Clock, faults: FaultLog) -> None:
    patience = Patience(faults, STORE, "GET")
    assert patience.failed(Fault("503 SlowDown", retry_after=20.0))
    assert clock.waits == [20.0]


def test_a_rate_limit_is_no_outage_but_has_an_end(clock: Clock, faults: FaultLog) -> None:
    begin = clock.now
    limit = Fault("429 Too Many Requests", retry_after=30.0)
    fail_until_given_up(Patience(faults, "hf://", "GET"), limit)
    assert PATIENCE_SECONDS < MAX_RATE_LIMIT_SECONDS - 30 <= clock.now - begin <= MAX_RATE_LIMIT_SECONDS
    clock.waits.clear()
    fail_until_given_up(Patience(faults, "hf://", "GET"), Fault("503 Busy", retry_after=30.0))
    assert sum(clock.waits) <= PATIENCE_SECONDS


def test_names_of_faults_hold_no_secrets(faults: FaultLog) -> None:
    secret = "https://me:hunter2secret@host"
    assert "hunter2secret" not in faults.note(secret, "GET", "reset")
    assert "hunter2secret" not in str(faults.drain())


def test_counts_from_many_threads_are_all_there(faults: FaultLog) -> None:
    def note() -> None:
        for _ in range(500):
            faults.note(STORE, "GET", "reset")

    threads = [threading.Thread(target=note) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults.drain() == ((f"{STORE}: GET: reset", 4000),)


def test_one_line() -> None:
    assert one_line(ValueError("\n first\n second")) == "first"
    assert one_line(TimeoutError()) == "TimeoutError"


@pytest.mark.parametrize(("least_tries", "num_tries"), [(1, 1), (2, 2)])
def test_a_try_that_outlasts_the_patience_may_be_tried_again(
    clock: Clock, faults: FaultLog, least_tries: int, num_tries: int
) -> None:
    faults.note_answer(STORE)
    patience = Patience(faults, STORE, "PUT", least_tries=least_tries)
    for _ in range(num_tries - 1):
        clock.now += 2 * PATIENCE_SECONDS
        assert patience.failed(GONE)
    clock.now += 2 * PATIENCE_SECONDS
    assert not patience.failed(GONE)
