from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.search.front import find_front
from raymerge.pipeline.search.study import Direction

DIRECTIONS = [Direction("accuracy", is_maximised=True), Direction("tokens", is_maximised=False)]
NUMBERS = st.integers(0, 4).map(float)


@given(st.lists(st.none() | st.tuples(NUMBERS, NUMBERS), max_size=12))
def test_no_value_is_better_than_one_of_the_front_and_each_other_is_beaten(
    values: list[tuple[float, float] | None],
) -> None:
    front = find_front(values, DIRECTIONS)
    chosen = [values[k] for k in front]
    assert len(set(chosen)) == len(chosen), "equal ones once"
    for value in values:
        if value is None:
            continue
        better = [
            other for other in values if other and other != value and other[0] >= value[0] and other[1] <= value[1]
        ]
        assert (value in chosen) == (not better)
