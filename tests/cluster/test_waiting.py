"""In which order items start, and which of them at once."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raymerge.cluster.runner import Resources
from raymerge.cluster.waiting import Waiting


def make_waiting(slots: list[int], num_slots: int) -> Waiting:
    return Waiting([Resources(mem_nbytes=1, cost=1, num_slots=each) for each in slots], num_slots)


def test_what_does_not_fit_is_passed_over() -> None:
    waiting = make_waiting([1, 3, 3, 1], 4)
    assert [waiting.take() for _ in range(3)] == [1, 0, None]
    waiting.release(1)
    assert [waiting.take() for _ in range(2)] == [2, None]
    waiting.release(0)
    assert waiting
    assert waiting.take() == 3
    assert not waiting


def test_an_item_that_is_done_again_comes_first() -> None:
    waiting = make_waiting([1, 1, 1], 1)
    first = waiting.take()
    assert first is not None
    waiting.release(first)
    waiting.repeat(first)
    assert waiting.take() == first


def test_twins_take_only_slots_that_nothing_waits_for() -> None:
    waiting = make_waiting([2, 1, 1], 4)
    assert [waiting.take() for _ in range(2)] == [0, 1]
    assert not waiting.has_spare
    assert not waiting.take_twice(1), "an item waits for the slot"
    assert waiting.take() == 2
    waiting.release(1)
    assert not waiting.take_twice(0), "it takes two slots"
    assert waiting.take_twice(2)
    assert not waiting.take_twice(2)
    waiting.release(2)
    waiting.release(2)
    assert waiting.take_twice(0)


def test_nothing_waits_any_more() -> None:
    waiting = make_waiting([1, 1], 2)
    waiting.clear()
    assert not waiting
    assert waiting.take() is None


@given(st.lists(st.integers(1, 9), max_size=20), st.integers(1, 8), st.data())
def test_every_item_starts_once_and_no_more_slots_are_taken_than_there_are(
    slots: list[int], num_slots: int, data: st.DataObject
) -> None:
    waiting = make_waiting(slots, num_slots)
    running: list[int] = []
    started: list[int] = []
    while waiting or running:
        while (item := waiting.take()) is not None:
            running.append(item)
            started.append(item)
            assert sum(min(slots[each], num_slots) for each in running) <= num_slots
        ended = data.draw(st.sampled_from(running))
        running.remove(ended)
        waiting.release(ended)
    assert sorted(started) == list(range(len(slots)))
    large = [min(slots[item], num_slots) for item in started if 2 * slots[item] > num_slots]
    assert large == sorted(large, reverse=True)
