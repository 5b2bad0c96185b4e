"""Values that a sweep gives to paths, from `--set` or from the config's `sweep:` section."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import yaml

from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.sections.sweep import PARTS
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import counted, listing, shown
from raymerge.pipeline.spectrum.names import check_name, name_settings
from raymerge.pipeline.spectrum.paths import Path, parse_path
from raymerge.pipeline.spectrum.ranges import MAX_POINTS, expand_range, is_range, parse_values, to_number

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Variation:
    """The settings of one point of a sweep."""

    name: str
    settings: Mapping[Path, object]
    """In the order given."""
    line: int | None = None
    """Line of the YAML that names it, from 1; None if none does."""


@dataclass(frozen=True, slots=True)
class _Axis:
    """Values of one path."""

    where: str
    path: Path
    values: Sequence[object]


def parse_sets(written: Sequence[str] | Mapping[str, object]) -> list[Variation]:
    """Return the grid that `--set` options span.

    Args:
        written: each as `PATH=VALUES`; or values, a list of them or their text by path.

    Raises:
        ConfigError: one is malformed, a path or a value is given twice, or there are too many points.
    """
    axes = []
    if isinstance(written, Mapping):
        for text, values in written.items():
            axes.append(_make_axis(f"set {text}", text, _list_values(f"set {text}", values)))
    else:
        for option in written:
            text, separator, values = _split(option)
            if not separator or not text:
                raise ConfigError(f"--set {option}: write PATH=VALUES, such as t=0.1:0.9:0.1 or density=0.3,0.5,0.7")
            axes.append(_make_axis(f"--set {text}", text, parse_values(f"--set {text}", values)))
    return _name(_cross(axes))


def parse_section(section: Place) -> list[Variation]:
    """Return the points that a `sweep:` section describes: grid times zipped lists, and named points.

    Raises:
        ConfigError: it is malformed, a path or value is given twice, or there are too many points.
    """
    unknown = [key for key in section.names() if key not in PARTS]
    if unknown:
        raise section.get(unknown[0]).error(f"unknown key; a sweep has {', '.join(PARTS)}")
    grid, zipped = (
        [_attempt(place, partial(_read_axis, place)) for place in map(part.get, part.names())]
        for part in (section.get("grid"), section.get("zip"))
    )
    if len({len(axis.values) for axis in zipped}) > 1:
        lengths = ", ".join(f"{axis.path.text} {len(axis.values)}" for axis in zipped)
        raise section.get("zip").error(f"lists that are zipped are of one length: {lengths}")
    combined = _attempt(section, partial(_cross, grid, zipped)) if grid or zipped else []
    named = list(_read_points(section.get("points")))
    if not combined and not named:
        raise section.error("nothing is varied; give --set PATH=VALUES, or a section with grid, zip or points")
    return _attempt(section, partial(_check_all, [*_name(combined), *named]))


def _split(option: str) -> tuple[str, str, str]:
    """Cut an option at the first `=` outside of brackets: a filter may have one."""
    depth = 0
    for k, sign in enumerate(option):
        depth += (sign == "[") - (sign == "]")
        if sign == "=" and depth <= 0:
            return option[:k].strip(), "=", option[k + 1 :].strip()
    return option, "", ""


def _make_axis(where: str, text: str, values: Sequence[object], line: int | None = None) -> _Axis:
    try:
        path = parse_path(text, line)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    keys = [_key(value) for value in values]
    twice = next((value for k, value in enumerate(values) if keys[k] in keys[:k]), None)
    if twice is not None:
        raise ConfigError(f"{where}: {shown(twice)} is given twice; list each value once")
    return _Axis(where, path, values)


def _key(value: object) -> str:
    """Return what equal values have in common: 1 and 1.0 are one."""
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        value = int(value)
    return json.dumps(value, sort_keys=True)


def _list_values(where: str, values: object) -> list[object]:
    if isinstance(values, str):
        return parse_values(where, values)
    if isinstance(values, Sequence):
        if not values:
            raise ConfigError(f"{where}: the list is empty; give at least one value")
        return [to_number(list(value) if isinstance(value, tuple) else value) for value in values]
    if isinstance(values, bool | int | float):
        return [values]
    raise ConfigError(f"{where}: {values!r} is given; a list of values or a text such as 0.1:0.9:0.1 is needed")


def _read_axis(place: Place) -> _Axis:
    text = place.path.partition(".")[2].partition(".")[2]
    raw = place.node.value if isinstance(place.node, yaml.ScalarNode) else place.value
    if isinstance(raw, str) and is_range(raw):  # YAML 1.1 takes 1:9:1 for a time of day
        return _make_axis(place.path, text, expand_range(place.path, raw), place.line)
    if isinstance(place.value, str):
        return _make_axis(place.path, text, parse_values(place.path, place.value), place.line)
    if not isinstance(place.value, list) or not place.value:
        raise place.error(f"{shown(place.value)} is given; write a list such as [0.3, 0.5], or a range as 0.1:0.9:0.1")
    return _make_axis(place.path, text, [to_number(value) for value in place.value], place.line)


def _read_points(place: Place) -> Iterator[Variation]:
    for name in place.names():
        point = place.get(name)
        _attempt(point, partial(check_name, point.path, name))
        if not point.names():
            raise point.error("it sets nothing; give it paths and values, such as {t: 0.5}")
        settings: dict[Path, object] = {}
        for text in point.names():
            value = point.get(text)
            axis = _attempt(value, partial(_make_axis, point.path, text, [], value.line))
            settings[axis.path] = to_number(value.value)
        yield Variation(name, settings, point.line)


def _attempt(place: Place, read: Callable[[], T]) -> T:
    """Read a value of the YAML; a mistake in it names its line."""
    try:
        return read()
    except PlaceError:
        raise
    except ConfigError as error:
        found = PlaceError(str(error))
        found.line = place.line
        raise found from None


def _cross(axes: Sequence[_Axis], zipped: Sequence[_Axis] = ()) -> list[dict[Path, object]]:
    """Return every combination of the values of axes, the last one changing fastest; zipped ones move together."""
    for k, axis in enumerate([*axes, *zipped]):
        for other in [*axes, *zipped][:k]:
            if other.path.label == axis.path.label:
                raise ConfigError(f"{axis.where}: the same place as {other.where}; give each path once")
    together = list(zip(*(axis.values for axis in zipped), strict=True))
    num_points = math.prod(len(axis.values) for axis in axes) * max(1, len(together))
    _check_number(num_points)
    choices = [[{axis.path: value} for value in axis.values] for axis in axes]
    if zipped:
        choices.append([{axis.path: value for axis, value in zip(zipped, row, strict=True)} for row in together])
    return [{path: value for part in parts for path, value in part.items()} for parts in itertools.product(*choices)]


def _check_number(num_points: int) -> None:
    if num_points > MAX_POINTS:
        raise ConfigError(
            f"the sweep has {num_points:,} points; at most {MAX_POINTS:,} are made at once: take fewer values, or"
            " several sweeps into one directory"
        )


def _name(settings: Sequence[Mapping[Path, object]]) -> list[Variation]:
    names = name_settings([{path.label: value for path, value in each.items()} for each in settings])
    return [Variation(name, each) for name, each in zip(names, settings, strict=True)]


def _check_all(variations: list[Variation]) -> list[Variation]:
    """Refuse points of one name, or with the same settings."""
    _check_number(len(variations))
    by_name: dict[str, Variation] = {}
    by_settings: dict[str, Variation] = {}
    for variation in variations:
        key = _key({path.text: _key(value) for path, value in variation.settings.items()})
        if variation.name.casefold() in by_name:
            raise ConfigError(f"sweep: two points are called {variation.name}; rename one")
        if key in by_settings:
            raise ConfigError(
                f"sweep: {variation.name} sets the same as {by_settings[key].name}: {describe(variation)}; leave one"
            )
        by_name[variation.name.casefold()] = by_settings[key] = variation
    return variations


def describe(variation: Variation) -> str:
    """Return what a point sets, for people."""
    return listing([f"{path.text} {shown(value)}" for path, value in variation.settings.items()], 5)


def count_points(variations: Sequence[Variation]) -> str:
    """Return how many points there are, for people."""
    return counted(len(variations), "point")
