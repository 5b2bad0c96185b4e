from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.curve.series import Series, make_series


def test_one_path_is_one_line_in_the_order_of_the_parameter() -> None:
    settings = {"c": {"t": 0.9}, "a": {"t": 0.1}, "b": {"t": 0.5}}
    assert make_series(["t"], settings) == (Series("", "t", ("a", "b", "c"), (0.1, 0.5, 0.9), is_line=True),)


def test_a_grid_is_a_line_for_each_combination_of_the_others() -> None:
    settings = {
        f"{method} {density} {t}": {"merge_method": method, "density": density, "t": t}
        for method, density, t in product(["ties", "slerp"], [0.2, 0.5], [0.1, 0.2, 0.3])
    }
    found = make_series(["merge_method", "density", "t"], settings)
    assert [each.name for each in found] == [
        f"merge_method = {method}, density = {density}" for method, density in product(["ties", "slerp"], [0.2, 0.5])
    ]
    assert all(each.is_line and each.path == "t" and each.values == (0.1, 0.2, 0.3) for each in found)
    assert found[1].points == ("ties 0.5 0.1", "ties 0.5 0.2", "ties 0.5 0.3")


def test_lists_that_are_zipped_are_one_line() -> None:
    settings = {f"{t}": {"t": t, "density": 1 - t} for t in (0.1, 0.2, 0.3)}
    (line,) = make_series(["density", "t"], settings)
    assert (line.path, line.points, line.is_line) == ("density", ("0.3", "0.2", "0.1"), True)


def test_points_by_name_are_apart_from_the_grid() -> None:
    settings: dict[str, dict[str, object]] = {
        "a": {"t": 0.1},
        "late": {"density": 1},
        "b": {"t": 0.2},
        "steep": {"t": [0, 1]},
    }
    assert make_series(["t", "density"], settings) == (
        Series("", "t", ("a", "b"), (0.1, 0.2), is_line=True),
        Series("other points", "", ("late", "steep"), (), is_line=False),
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"a": {"t": 0.1, "d": 0.5}, "b": {"t": 0.2, "d": 0.1}, "c": {"t": 0.3, "d": 0.9}}, id="random"),
        pytest.param({"a": {"t": [0, 1]}, "b": {"t": [1, 0]}}, id="gradients"),
        pytest.param({"a": {"t": "slow"}, "b": {"t": "auto"}}, id="words"),
        pytest.param({"a": {"t": True}, "b": {"t": False}}, id="truth"),
        pytest.param({"a": {"t": [0, 1]}, "b": {"t": 0.5}}, id="one number"),
    ],
)
def test_points_that_do_not_follow_from_one_another_are_not_joined(settings: dict[str, dict[str, object]]) -> None:
    (series,) = make_series(["t", "d"], settings)
    assert not series.is_line
    assert set(series.points) == set(settings)


@given(
    st.dictionaries(
        st.text("xyz", min_size=1, max_size=3),
        st.fixed_dictionaries(
            {
                "a": st.one_of(st.integers(0, 3), st.none()),
                "b": st.integers(0, 2),
                "c": st.sampled_from(["p", "q", [1]]),
            }
        ),
    )
)
def test_every_point_is_in_one_series(settings: dict[str, dict[str, object]]) -> None:
    found = make_series(["a", "b", "c"], settings)
    assert sorted(name for series in found for name in series.points) == sorted(settings)
    assert all(list(series.values) == sorted(series.values) for series in found)
    assert len({series.name for series in found}) == len(found)
