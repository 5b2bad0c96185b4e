from __future__ import annotations

from collections.abc import Mapping, Sequence

from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.search.best import find_best, judge_best
from raymerge.pipeline.search.study import Direction
from raymerge.pipeline.search.values import Values

DIRECTIONS = [Direction("accuracy", is_maximised=True), Direction("tokens", is_maximised=False)]
NUMBERS = st.integers(0, 4).map(float)
FOUND = st.lists(st.none() | st.tuples(NUMBERS, NUMBERS), max_size=12)


def name_all(values: Sequence[Values | None]) -> dict[str, Values | None]:
    return {f"trial-{k}": own for k, own in enumerate(values)}


@given(FOUND)
def test_no_value_is_better_than_one_of_the_best_and_each_other_is_beaten(found: list[Values | None]) -> None:
    values = name_all(found)
    chosen = [values[name] for name in find_best(values, DIRECTIONS)]
    assert len(set(chosen)) == len(chosen), "equal ones once"
    for value in found:
        if value is not None:
            better = any(o and o != value and o[0] >= value[0] and o[1] <= value[1] for o in found)
            assert (value in chosen) == (not better)


@given(FOUND)
def test_the_best_are_judged_until_all_of_them_are(found: list[Values | None]) -> None:
    cheap = name_all(found)
    dear = name_all([own and (own[0] - k % 3, own[1] + k % 2) for k, own in enumerate(found)])
    judged: list[str] = []

    def judge(names: Sequence[str]) -> Mapping[str, Values | None]:
        judged.extend(names)
        return {name: dear[name] for name in names}

    best = judge_best(cheap, DIRECTIONS, judge)
    assert len(judged) == len(set(judged)), "each once"
    assert all(own == dear[name] for name, own in best.items())
    known = cheap | {name: dear[name] for name in judged}
    assert list(best) == find_best(known, DIRECTIONS)


def test_one_that_falls_behind_or_fails_is_replaced() -> None:
    cheap: dict[str, Values | None] = {"a": (0.9, 5.0), "b": (0.8, 5.0), "c": (0.7, 5.0)}
    dear: dict[str, Values | None] = {"a": (0.6, 5.0), "b": None, "c": (0.65, 5.0)}
    assert judge_best(cheap, DIRECTIONS, lambda names: {name: dear[name] for name in names}) == {"c": (0.65, 5.0)}
