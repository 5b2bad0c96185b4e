"""Which items take far longer than their like."""

from __future__ import annotations

import pytest

from raymerge.cluster.pace import Pace


@pytest.fixture
def pace() -> Pace:
    """A run whose items take 10 seconds for a cost of 100, and tell of as many bytes."""
    pace = Pace()
    for seconds in (9.0, 10.0, 30.0):
        pace.note(100, seconds, 100)
    return pace


@pytest.mark.parametrize(
    ("cost", "seconds", "nbytes", "silent_seconds", "expected"),
    [
        (100, 9.9, 1, 9.0, False),  # no longer than usual
        (100, 12.0, 50, 11.0, False),  # 24 s, as it seems
        (100, 15.0, 50, 0.0, True),  # 30 s, and a twin would be done in 10
        (100, 27.0, 90, 0.0, False),  # 30 s, but done before a twin
        (100, 27.0, 90, 10.0, True),  # done before a twin if it went on, which it does not
        (100, 31.0, 100, 10.0, True),  # has told of all, and does not end
        (100, 19.0, 0, 19.0, False),  # may be loading libraries
        (100, 21.0, 0, 21.0, True),
        (300, 15.0, 50, 0.0, False),  # takes three times as long as a usual one, as it should
        (300, 45.0, 150, 0.0, True),
        (10, 4.9, 5, 4.0, False),  # a worker would take as long to start
        (10, 5.1, 5, 4.0, True),
        (0, 5.1, 5, 4.0, True),
    ],
)
def test_stragglers(pace: Pace, cost: int, seconds: float, nbytes: int, silent_seconds: float, expected: bool) -> None:
    assert pace.is_straggler(cost, seconds, nbytes, silent_seconds) is expected


def test_there_is_none_before_an_item_is_finished() -> None:
    assert not Pace().is_straggler(1, 1000.0, 1, 1000.0)


def test_items_that_tell_nothing_are_compared_by_time() -> None:
    pace = Pace()
    pace.note(1, 10.0, 0)
    assert not pace.is_straggler(1, 29.0, 0, 29.0)
    assert pace.is_straggler(1, 31.0, 0, 31.0)
