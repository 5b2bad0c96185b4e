from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.curve.front import find_dominators, find_front

COSTS = st.integers(1, 3).flatmap(
    lambda num: st.dictionaries(st.text("abcdefgh", min_size=1, max_size=2), st.tuples(*[st.integers(0, 6)] * num))
)


def beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    pairs = list(zip(one, other, strict=True))
    return all(mine <= its for mine, its in pairs) and any(mine < its for mine, its in pairs)


@given(COSTS)
def test_the_front_is_what_nothing_dominates(costs: dict[str, tuple[float, ...]]) -> None:
    front = find_front(costs)
    expected = {name for name in costs if not any(beats(other, costs[name]) for other in costs.values())}
    assert set(front) == expected
    assert len(front) == len(expected)
    assert [costs[name] for name in front] == sorted(costs[name] for name in front)


@given(COSTS)
def test_dominators_are_at_least_as_good_in_both_and_better_in_one(costs: dict[str, tuple[float, ...]]) -> None:
    for name in costs:
        found = find_dominators(name, costs)
        assert set(found) == {other for other in costs if beats(costs[other], costs[name])}
        assert [costs[other] for other in found] == sorted(costs[other] for other in found)
        assert bool(found) == (name not in find_front(costs))
