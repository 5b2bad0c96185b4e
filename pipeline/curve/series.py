"""Lines of a spectrum: the points that belong on one, in their order."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.curve.types import number

Settings = Mapping[str, Mapping[str, object]]
"""Settings of each point, by its name."""


@dataclass(frozen=True, slots=True)
class Series:
    """Points that differ in one parameter, in its order."""

    name: str
    """The settings that its points share and other series do not; empty where there is no other."""
    path: str
    """The parameter along the line; empty where no parameter is a number in all points."""
    points: tuple[str, ...]
    values: tuple[float, ...]
    """The parameter's value at each point; empty where there is no such parameter."""
    is_line: bool
    """Whether the points follow from one another, so that a line may join them."""


def make_series(paths: Sequence[str], settings: Settings) -> tuple[Series, ...]:
    """Sort points into series.

    The parameter along the lines is the one with the most values that are numbers; points where it is no number are a
    series of their own, not joined, and so are all points if no parameter has two values. Another one
    divides the points into several series if it has different values at one value of that parameter, as in a grid. What
    varies along a line besides, as in zipped lists, has to grow or fall all along; if it does not, as in a random
    search, the points are not joined.

    Args:
        paths: of the config that are varied.
        settings: of each point.

    Returns:
        One series for each combination of the parameters that divide the points, in the order of their first points.
    """
    if not settings:
        return ()
    path = _choose_path(paths, settings)
    others = {name: each for name, each in settings.items() if not path or number(each.get(path)) is None}
    lines = _make_lines(path, paths, {name: each for name, each in settings.items() if name not in others})
    rest = [Series("other points" if lines else "", "", tuple(others), (), is_line=False)] if others else []
    return (*lines, *rest)


def _make_lines(path: str, paths: Sequence[str], settings: Settings) -> list[Series]:
    """Return the series of points that have a value of the parameter along them."""
    others = [other for other in paths if other != path]
    dividing = [other for other in others if _divides(other, path, settings)]
    groups: dict[str, list[str]] = defaultdict(list)
    for name in settings:
        groups[_label(dividing, settings[name])].append(name)
    along = [other for other in others if other not in dividing]
    return [_make_line(label, path, points, along, settings) for label, points in groups.items()]


def _make_line(label: str, path: str, points: list[str], along: list[str], settings: Settings) -> Series:
    points = sorted(points, key=lambda name: _value(settings[name], path))
    is_line = all(_is_monotone([settings[name].get(other) for name in points]) for other in along)
    return Series(label, path, tuple(points), tuple(_value(settings[name], path) for name in points), is_line)


def _choose_path(paths: Sequence[str], settings: Settings) -> str:
    """Return the parameter along the lines; empty if there is none."""
    counts = {path: len({number(each.get(path)) for each in settings.values()} - {None}) for path in paths}
    best = max(counts, key=lambda path: counts[path], default="")
    return best if best and (counts[best] > 1 or counts[best] == len(settings)) else ""


def _divides(other: str, path: str, settings: Settings) -> bool:
    found: dict[float, str] = {}
    for each in settings.values():
        value = _key(each.get(other))
        if found.setdefault(_value(each, path), value) != value:
            return True
    return False


def _is_monotone(values: Sequence[object]) -> bool:
    """Tell whether values are all the same, or numbers that never fall or never grow."""
    if len({_key(value) for value in values}) == 1:
        return True
    numbers = [number(value) for value in values]
    known = [value for value in numbers if value is not None]
    return len(known) == len(values) and known in (sorted(known), sorted(known, reverse=True))


def _label(paths: Sequence[str], settings: Mapping[str, object]) -> str:
    return ", ".join(f"{path} = {_show(settings.get(path))}" for path in paths)


def _show(value: object) -> str:
    return value if isinstance(value, str) else _key(value)


def _key(value: object) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def _value(settings: Mapping[str, object], path: str) -> float:
    value = number(settings.get(path))
    assert value is not None, path
    return value
