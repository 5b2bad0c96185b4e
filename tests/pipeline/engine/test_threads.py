"""Threads that merge one window together."""

from __future__ import annotations

import threading
import time

import pytest

from raymerge.pipeline.engine import threads
from raymerge.pipeline.engine.threads import open_threads, run_in_turn


def test_an_error_is_raised_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 2)
    is_over = threading.Event()

    def fail() -> None:
        raise ValueError("this one")

    def go_on() -> None:
        time.sleep(0.1)
        is_over.set()

    with open_threads(2) as run_all:
        with pytest.raises(ValueError, match="this one"):
            run_all([fail, go_on])
        assert is_over.is_set()


def test_results_come_in_order_from_several_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 2)
    both = threading.Barrier(2)

    def meet() -> int:
        return both.wait(timeout=60)

    with open_threads(3) as run_all:
        assert sorted(run_all([meet, meet])) == [0, 1]
        assert run_all([lambda k=k: k for k in range(9)]) == [*range(9)]  # type: ignore[misc]


def test_one_core_needs_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "count_cores", lambda: 1)
    with open_threads(4) as run_all:
        assert run_all is run_in_turn
