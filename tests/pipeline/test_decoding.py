"""JSON values become typed ones, or are refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import pytest

from raymerge.pipeline.decoding import decode, parse_json


@dataclass(frozen=True)
class Inner:
    name: str
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class Outer:
    pair: tuple[str, float]
    inner: Inner | None
    is_on: bool
    mode: Literal["fast", "slow"] = "fast"
    parts: Mapping[str, Inner] = field(default_factory=dict)


GIVEN: dict[str, Any] = {"pair": ["a", 1], "inner": {"name": "b", "counts": [1, 2]}, "is_on": True}


def test_a_value_of_every_type() -> None:
    found = decode({**GIVEN, "mode": "slow", "parts": {"x": {"name": "c"}}, "of a later version": 1}, Outer)
    assert found == Outer(("a", 1.0), Inner("b", (1, 2)), True, "slow", {"x": Inner("c")})
    assert type(found.pair[1]) is float
    assert decode({**GIVEN, "inner": None}, Outer).inner is None


@pytest.mark.parametrize(
    "change",
    [
        {"pair": ["a"]},
        {"pair": ["a", 1, 2]},
        {"pair": ["a", True]},
        {"pair": ["a", 1e300]},
        {"pair": ["a", float("nan")]},
        {"pair": {"a": 1}},
        {"inner": []},
        {"inner": {}},
        {"inner": {"name": 1}},
        {"inner": {"name": "b", "counts": [1.5]}},
        {"is_on": 1},
        {"is_on": None},
        {"mode": "medium"},
        {"mode": []},
        {"parts": []},
        {"parts": {"x": None}},
    ],
)
def test_a_value_of_another_type(change: dict[str, Any]) -> None:
    with pytest.raises((TypeError, KeyError, ValueError)):
        decode({**GIVEN, **change}, Outer)


def test_a_field_that_is_missing() -> None:
    with pytest.raises(KeyError, match="is_on"):
        decode({name: value for name, value in GIVEN.items() if name != "is_on"}, Outer)


@pytest.mark.parametrize("depth", [101, 600, 990, 100_000])
@pytest.mark.parametrize(("start", "stop"), [("[", "]"), ('{"a":', "}")])
def test_json_that_is_nested_too_deeply(depth: int, start: str, stop: str) -> None:
    inside = "1" if stop == "}" else ""
    with pytest.raises(ValueError, match="nested too deeply"):
        parse_json(start * depth + inside + stop * depth)
    parse_json(start * 100 + inside + stop * 100)


@pytest.mark.parametrize("content", ["5", '"x"', "[]", '{"a": [1, {"b": null}]}', b"[1]"])
def test_json(content: str | bytes) -> None:
    assert parse_json(content) == json.loads(content)
