from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.ops.registry import Parameter, Value
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.values import Rule, Setting, interpolate, parse_setting, resolve
from raymerge.pipeline.errors import ConfigError

MODE = Parameter("p", str, per_model=False, default="l1", choices=("l1", "inverse_density"))
T = Parameter("t", float, per_model=False, default=None)
MLP = "model.layers.3.mlp.up_proj.weight"
ATTENTION = "model.layers.12.self_attn.q_proj.weight"
NORM = "model.norm.weight"


def parameter(kind: type[Value], default: Value | None = None) -> Parameter:
    return Parameter("p", kind, per_model=False, default=default)


def parse(value: object, kind: type[Value] = float) -> tuple[Setting, list[str]]:
    place = Place(value, "parameters.p")
    return parse_setting(place, parameter(kind)), [finding.message for finding in place.findings.warnings]


def test_a_choice_is_one_of_those_there_are() -> None:
    assert parse_setting(Place("inverse_density", "p"), MODE).value(MLP, 0.0) == "inverse_density"
    with pytest.raises(ConfigError, match=r"\"inverse\" is given; did you mean 'inverse_density'"):
        parse_setting(Place("inverse", "p"), MODE)
    with pytest.raises(ConfigError, match="3 is given; it is one of l1, inverse_density"):
        parse_setting(Place([3, 4], "p"), MODE)


def evaluate(value: object, tensor: str = MLP, position: float = 0.0, kind: type[Value] = float) -> Value | None:
    return parse(value, kind)[0].value(tensor, position)


@pytest.mark.parametrize(
    ("value", "position", "expected"),
    [
        (0.5, 0.7, 0.5),
        (1, 0.0, 1.0),
        ([1, 2], 0.0, 1.0),
        ([1, 2], 0.25, 1.25),
        ([1, 2], 1.0, 2.0),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([0, 0.5, 0.3, 0.7, 1], 10 / 31, (1 - (10 / 31 * 4 - 1)) * 0.5 + (10 / 31 * 4 - 1) * 0.3),
        ([7], 0.4, 7.0),
        ([], 0.5, None),
        ([-1, 1], 0.5, 0.0),
        ("1e-5", 0.0, 1e-5),
        (["1e-3", "3e-3"], 0.5, 2e-3),
        ([1, "3"], 0.5, 2.0),
    ],
)
def test_a_gradient_is_interpolated_linearly(value: object, position: float, expected: float | None) -> None:
    assert evaluate(value, position=position) == expected


@pytest.mark.parametrize(
    ("kind", "value", "position", "expected"),
    [
        (bool, [True, False], 0.5, True),
        (bool, [True, False], 1.0, False),
        (bool, [True, False, True], 0.49, True),
        (bool, [True, False, True], 0.5, False),
        (str, ["a", "b", "c"], 0.99, "b"),
        (str, ["a", "b", "c"], 1.0, "c"),
        (int, [10, 20], 0.5, 15),
        (int, [10, 21], 0.35, 14),
    ],
)
def test_what_is_no_number_changes_in_steps(kind: type[Value], value: object, position: float, expected: Value) -> None:
    result = evaluate(value, position=position, kind=kind)
    assert result == expected
    assert type(result) is kind


@pytest.mark.parametrize(
    ("kind", "value", "expected"),
    [
        (float, 3, 3.0),
        (float, "0.5", 0.5),
        (float, "-1E-2", -0.01),
        (int, 10.0, 10),
        (int, "10", 10),
        (int, 2**60 + 1, 2**60 + 1),
        (bool, 1, True),
        (bool, 0.0, False),
        (bool, "true", True),
        (bool, "Off", False),
        (str, "sum", "sum"),
    ],
)
def test_values_get_the_declared_type(kind: type[Value], value: object, expected: Value) -> None:
    result = evaluate(value, kind=kind)
    assert result == expected
    assert type(result) is kind


@pytest.mark.parametrize(
    ("kind", "value", "message"),
    [
        (float, True, "parameters.p: true is given, a number"),
        (float, "half", '"half" is given, a number'),
        (float, None, "nothing is given, a number"),
        (float, math.nan, "a finite number is needed"),
        (float, "-NaN", "a finite number is needed"),
        (float, -math.inf, "a finite number is needed"),
        pytest.param(float, 10**400, "a finite number is needed", id="float-huge"),
        (float, [0.5, math.inf], r"parameters\.p\[1\]: .* finite"),
        (float, [1, True], r"parameters\.p\[1\]: true is given"),
        (float, [[1, 2]], r"parameters\.p\[0\]: \[1, 2\] is given"),
        (float, [1, {"value": 2}], "mixes values and"),
        (float, [{"filter": "mlp"}], r"parameters\.p\[0\]: `value` is missing"),
        (float, {"filter": "mlp", "value": None}, "`value` is missing"),
        (float, {"filter": "mlp", "value": {"value": 1}}, r"parameters\.p\.value: .* a number"),
        (float, {"filter": 3, "value": 1}, r"parameters\.p\.filter: 3 is given, .* quotes"),
        (float, {"filter": "regex:(", "value": 1}, r"parameters\.p\.filter: .*not a valid regular expression"),
        (float, {"filter": "regex:a{2000}", "value": 1}, "not a valid regular expression"),
        (float, {"filter": r"regex:(?!a)b", "value": 1}, "look-around"),
        (float, {"filter": r"regex:(a)\1", "value": 1}, "back-references"),
        (int, 1.5, "a whole number"),
        (int, True, "a whole number"),
        (bool, 2, "true or false"),
        (bool, "maybe", "true or false"),
        (str, 1, "a string"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_its_path(kind: type[Value], value: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(value, kind)


@pytest.mark.parametrize(
    ("pattern", "matching"),
    [
        (None, {MLP, ATTENTION, NORM}),
        ("*", {MLP, ATTENTION, NORM}),
        ("", {MLP, ATTENTION, NORM}),
        ("mlp", {MLP}),
        ("MLP", set()),
        ("layers.1", {ATTENTION}),
        ("norm", {NORM}),
        ("model.", {MLP, ATTENTION, NORM}),
        ("regex:mlp|norm", {MLP, NORM}),
        (r"regex:layers\.\d\.", {MLP}),
        ("regex:^norm", set()),
        ("glob:*.mlp.*", {MLP}),
        ("glob:mlp", set()),
        ("glob:model.layers.[0-9].*", {MLP}),
        ("glob:*.weight", {MLP, ATTENTION, NORM}),
    ],
)
def test_filters_are_substrings_unless_they_say_otherwise(pattern: str | None, matching: set[str]) -> None:
    rule = Rule(pattern, (1.0,))
    assert {name for name in (MLP, ATTENTION, NORM) if rule.matches(name)} == matching


def test_the_first_matching_entry_wins_even_if_it_is_unset() -> None:
    value = [{"filter": "mlp", "value": [1, 2]}, {"filter": "up_proj", "value": 5}, {"filter": "norm", "value": []}]
    assert evaluate(value, MLP, 0.5) == 1.5
    assert evaluate([*value, {"value": 9}], NORM) is None
    assert evaluate([*value, {"value": 9}], ATTENTION) == 9
    assert evaluate({"filter": "mlp", "value": 4}, MLP) == 4
    assert evaluate({"filter": "mlp", "value": 4}, NORM) is None


def test_levels_fall_through_where_no_filter_matches() -> None:
    def level(value: object) -> dict[str, Setting]:
        return {"t": parse(value)[0]}

    levels = [{}, level({"filter": "mlp", "value": 0.1}), level([{"filter": "norm", "value": []}, {"value": 0.2}])]
    assert resolve(T, levels, MLP, 0) == 0.1
    assert resolve(T, levels, ATTENTION, 0) == 0.2
    assert resolve(T, levels, NORM, 0) is None
    assert resolve(T, [*levels, level(0.0)], NORM, 0) == 0.0
    assert resolve(parameter(float, default=0.7), levels, MLP, 0) == 0.7


def test_a_false_value_is_a_value() -> None:
    flag = parameter(bool, default=True)
    assert resolve(flag, [{"p": parse(False, bool)[0]}, {"p": parse(True, bool)[0]}], MLP, 0) is False


@pytest.mark.parametrize(
    ("value", "warning"),
    [
        ({"filter": "*.mlp.*", "value": 1}, "parameters.p.filter: '*.mlp.*' is looked for in tensor names as it is"),
        ([{"value": 1}, {"filter": "mlp", "value": 2}], "parameters.p[1]: is never used"),
        ([{"filter": "*", "value": 1}, {"value": 2}], "parameters.p[1]: is never used"),
        ({"filters": "mlp", "value": 1}, "parameters.p.filters: unknown key, ignored; did you mean 'filter'?"),
    ],
)
def test_what_cannot_be_meant_is_warned_about(value: object, warning: str) -> None:
    warnings = parse(value)[1]
    assert len(warnings) == 1
    assert warnings[0].startswith(warning)


def test_sensible_filters_give_no_warning() -> None:
    value = [{"filter": p, "value": 1} for p in ("mlp.up_proj", "regex:(mlp|norm)$", "glob:*.mlp.*", "*")]
    assert parse(value)[1] == []


def test_settings_survive_pickling() -> None:
    setting = parse([{"filter": "regex:mlp", "value": [1, 2]}, {"value": 3}])[0]
    assert pickle.loads(pickle.dumps(setting)) == setting


# The oracle below is written against the rules as a user reads them, on the raw data, with the filters' effect spelled
# out by hand.

FILTERS: dict[str | None, set[str]] = {
    None: {MLP, ATTENTION, NORM},
    "*": {MLP, ATTENTION, NORM},
    "mlp": {MLP},
    "layers": {MLP, ATTENTION},
    "lm_head": set(),
    "regex:q_proj|norm": {ATTENTION, NORM},
    "glob:*.norm.weight": {NORM},
}
NUMBERS = st.floats(-10, 10) | st.integers(-10, 10)
GRADIENTS = NUMBERS | st.lists(NUMBERS, max_size=5)
RULES = st.fixed_dictionaries({"value": GRADIENTS}, optional={"filter": st.sampled_from(list(FILTERS))})
LEVELS = st.lists(st.none() | GRADIENTS | RULES | st.lists(RULES, min_size=1, max_size=4), max_size=4)


def brute_force(levels: Sequence[Any], tensor: str, layer: int, num_layers: int) -> float | None:
    t = layer / (num_layers - 1) if num_layers > 1 else 1.0
    for raw in levels:
        rules = [raw] if isinstance(raw, dict) else raw
        if not (isinstance(rules, list) and rules and isinstance(rules[0], dict)):
            rules = [{"value": raw}]
        for rule in rules:
            if tensor not in FILTERS[rule.get("filter")]:
                continue
            value = rule["value"]
            if value is None or value == []:
                break
            if not isinstance(value, list):
                return float(value)
            s = t * (len(value) - 1)
            i = math.floor(s)
            j = min(i + 1, len(value) - 1)
            return float((1 - (s - i)) * value[i] + (s - i) * value[j])
    return None


@settings(deadline=None)
@given(levels=LEVELS, tensor=st.sampled_from([MLP, ATTENTION, NORM]), num_layers=st.integers(1, 40), data=st.data())
def test_resolve_agrees_with_brute_force(levels: list[Any], tensor: str, num_layers: int, data: st.DataObject) -> None:
    layer = data.draw(st.integers(0, num_layers - 1))
    given_levels = [{} if raw is None else {"t": parse(raw)[0]} for raw in levels]
    position = layer / (num_layers - 1) if num_layers > 1 else 1.0
    expected = brute_force(levels, tensor, layer, num_layers)
    assert resolve(T, given_levels, tensor, position) == expected


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=8), st.floats(0, 1))
def test_a_gradient_stays_between_its_values(values: list[float], position: float) -> None:
    margin = 1e-9 * max(map(abs, values))
    assert min(values) - margin <= interpolate(values, position) <= max(values) + margin  # type: ignore[operator]
