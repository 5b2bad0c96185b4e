"""The `search:` section of a recipe: which parameters may have which values."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import shown

_RANGE_KEYS = ("min", "max", "step", "log")
_MAX_CHOICES = 1000


@dataclass(frozen=True, slots=True)
class Interval:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    step: float | None
    """Step of a grid that begins at `low`; None for every number."""
    is_log: bool
    """Whether orders of magnitude are equally likely."""
    is_whole: bool
    """Whether values are whole numbers."""


@dataclass(frozen=True, slots=True)
class Choices:
    """Any of some values, in no order."""

    values: tuple[str, ...]
    """Each as JSON, since lists may be among them."""


Dimension = Interval | Choices
Space = Mapping[str, Dimension]
"""The values that each path of the config may have, in the order of the recipe."""


def parse_space(section: Place) -> Space:
    """Return the space that the `parameters` of a `search:` section describe.

    Raises:
        PlaceError: it is empty, or a range or list is malformed.
    """
    unknown = [key for key in section.names() if key != "parameters"]
    if unknown:
        raise section.get(unknown[0]).error("unknown key; `search` has `parameters`, each with a range or a list")
    parameters = section.get("parameters")
    if not parameters.names():
        raise section.error("it names no parameters; write search: {parameters: {t: {min: 0, max: 1}}}")
    return {name: _parse_dimension(parameters.get(name)) for name in parameters.names()}


def first_values(dimension: Dimension) -> list[object]:
    """Return all values of a list, or the lowest of a range: enough to see whether a path can be set."""
    if isinstance(dimension, Choices):
        return [json.loads(value) for value in dimension.values]
    return [dimension.low]


def _parse_dimension(place: Place) -> Dimension:
    value = place.value
    if isinstance(value, list):
        return _parse_choices(place, value)
    if isinstance(value, Mapping):
        return _parse_interval(place)
    raise place.error(f"{shown(value)} is given; write {{min: 0, max: 1}}, or a list of values")


def _parse_choices(place: Place, values: Sequence[object]) -> Choices:
    written = tuple(json.dumps(value) for value in values)
    if len(written) < 2:
        raise place.error(f"{len(written)} value is listed; a search needs at least two" if written else "it is empty")
    if len(set(written)) < len(written):
        raise place.error("a value is listed twice; list each once")
    if len(written) > _MAX_CHOICES:
        raise place.error(
            f"{len(written):,} values are listed; at most {_MAX_CHOICES:,} can be searched: write a range"
        )
    return Choices(written)


def _parse_interval(place: Place) -> Interval:
    for name in place.names():
        if name not in _RANGE_KEYS:
            raise place.get(name).error(f"unknown key; a range has {', '.join(_RANGE_KEYS)}")
    low, high = _parse_number(place, "min"), _parse_number(place, "max")
    if not low < high:
        raise place.error(f"min is {low:g} and max {high:g}; min must be the smaller one")
    step = None if place.get("step").value is None else _parse_number(place, "step")
    if step is not None and not 0 < step <= high - low:
        raise place.get("step").error(f"it is {step:g}; it must be above 0, and at most max - min, {high - low:g}")
    is_log = place.get("log").value or False
    if not isinstance(is_log, bool):
        raise place.get("log").error(f"it is {shown(is_log)}; true or false is needed")
    if is_log and (low <= 0 or step is not None):
        raise place.get("log").error("a logarithmic range begins above 0, and has no step")
    is_whole = (
        all(type(place.get(name).value) is int for name in ("min", "max")) and type(place.get("step").value) is int
    )
    return Interval(low, high, step, is_log, is_whole)


def _parse_number(place: Place, name: str) -> float:
    value = place.get(name).value
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise place.error(f"{name} is {shown(value)}; a number is needed, such as {{min: 0, max: 1, step: 0.05}}")
    return float(value)
