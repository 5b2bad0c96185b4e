"""Parameter values of a config: constants, gradients over the layers, filters on tensor names."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.ops.registry import Parameter, Value
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import shown, suggest
from raymerge.pipeline.patterns import compile_pattern

BOOLS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
"""Words for true and false in YAML and elsewhere, in lower case."""
_PATTERN_SIGNS = set("*?[]()|^$\\")


@dataclass(frozen=True, slots=True)
class Rule:
    """A value for the tensors that a filter lets through."""

    filter: str | None
    """A piece of the tensor's name, or a pattern after `regex:` or `glob:`; None or `*` for all tensors."""
    values: tuple[Value, ...]
    """One value, or a gradient; none where the value is unset. All of the parameter's type."""

    def matches(self, tensor: str) -> bool:
        """Whether the filter lets a tensor of this name through.

        >>> Rule("mlp", ()).matches("layers.0.mlp.up"), Rule("regex:[13].mlp", ()).matches("layers.0.mlp.up")
        (True, False)
        """
        if self.filter is None or self.filter == "*":
            return True
        kind, _, pattern = self.filter.partition(":")
        if kind == "regex":
            return compile_pattern(pattern).search(tensor) is not None
        if kind == "glob":
            return fnmatch.fnmatchcase(tensor, pattern)
        return self.filter in tensor


@dataclass(frozen=True, slots=True)
class Setting:
    """One parameter as the config gives it in one place."""

    rules: tuple[Rule, ...]
    """The first that lets a tensor through decides, also if its value is unset."""

    def value(self, tensor: str, position: float) -> Value | None:
        """Return the value for a tensor at a position in [0, 1] of its stack of layers; None where it is unset.

        >>> Setting((Rule("mlp", (0.5,)), Rule(None, (0.0, 1.0)))).value("model.norm", 0.25)
        0.25
        """
        rule = next((rule for rule in self.rules if rule.matches(tensor)), None)
        return interpolate(rule.values, position) if rule and rule.values else None


Settings = Mapping[str, Setting]
"""The parameters in one place of the config, by name."""


def resolve(parameter: Parameter, levels: Sequence[Settings], tensor: str, position: float) -> Value | None:
    """Return a parameter's value for one tensor, its default where the config has none, or None without a default.

    A level that names the parameter but whose filters all miss leaves the decision to the next one.

    Args:
        parameter: as the op declares it.
        levels: where it may be given, highest precedence first.
        tensor: the name that filters see.
        position: of the tensor's layer in its stack, in [0, 1].
    """
    for settings in levels:
        setting = settings.get(parameter.name)
        value = setting.value(tensor, position) if setting else None
        if value is not None:
            return value
    return parameter.default


def overlay(upper: Settings, lower: Settings) -> Settings:
    """Return the parameters of two levels as one: the lower one counts where all filters of the upper one miss."""
    both = {name: Setting((*upper[name].rules, *lower[name].rules)) for name in upper.keys() & lower.keys()}
    return {**lower, **upper, **both}


def interpolate(values: Sequence[Value], position: float) -> Value:
    """Return a gradient's value: numbers are interpolated linearly (whole ones rounded), others change in steps.

    >>> interpolate((0.0, 1.0, 0.0), 0.25), interpolate((10, 20), 0.5), interpolate((True, False), 0.5)
    (0.5, 15, True)
    """
    place = position * (len(values) - 1)
    index = int(place)
    left, right = values[index], values[min(index + 1, len(values) - 1)]
    fraction = place - index
    if fraction == 0 or isinstance(left, bool | str) or isinstance(right, bool | str):
        return left
    value = (1 - fraction) * left + fraction * right
    return round(value) if isinstance(left, int) else value


def is_setting(value: object) -> bool:
    """Tell whether a value has the form of a parameter, whatever the parameter is.

    >>> is_setting([{"filter": "mlp", "value": [0, 1]}, {"value": 1}]), is_setting({"model": "a"}), is_setting([0, {}])
    (True, False, False)
    """
    if isinstance(value, dict):
        return "value" in value and not isinstance(value["value"], dict) and is_setting(value["value"])
    if isinstance(value, list):
        return len({isinstance(item, dict) for item in value}) < 2 and all(map(is_setting, value))
    return True


def parse_setting(place: Place, parameter: Parameter) -> Setting:
    """Return a parameter as the config gives it at one place, its values converted to the parameter's type.

    Raises:
        ConfigError: a value is of another kind, not finite, missing, or a filter is not a valid pattern.
    """
    if isinstance(place.value, dict):
        return Setting((_parse_rule(place, parameter),))
    if not isinstance(place.value, list):
        return Setting((Rule(None, (_parse_value(place, parameter),)),))
    kinds = {isinstance(value, dict) for value in place.value}
    if kinds != {True}:
        if kinds == {True, False}:
            raise place.error("the list mixes values and {filter, value} entries; write all of it in one way")
        return Setting((Rule(None, _parse_gradient(place, parameter)),))
    rules: list[Rule] = []
    for entry in place.elements():
        if rules and rules[-1].filter in (None, "*"):
            entry.warn("is never used, because the entry before it takes every tensor; move that one to the end")
        rules.append(_parse_rule(entry, parameter))
    return Setting(tuple(rules))


def _parse_rule(place: Place, parameter: Parameter) -> Rule:
    place.check_keys(("filter", "value"))
    value, pattern = place.get("value"), place.get("filter")
    if value.value is None:
        raise place.error(f"`value` is missing: {shown(place.value)}")
    values = _parse_gradient(value, parameter) if isinstance(value.value, list) else (_parse_value(value, parameter),)
    if pattern.value is None:
        return Rule(None, values)
    if not isinstance(pattern.value, str):
        raise pattern.error(f"{shown(pattern.value)} is given, a string is needed; put it in quotes")
    _check_filter(pattern, pattern.value)
    return Rule(pattern.value, values)


def _check_filter(place: Place, pattern: str) -> None:
    if pattern.startswith("regex:"):
        try:
            compile_pattern(pattern.removeprefix("regex:"))
        except ValueError as error:
            raise place.error(
                f"{pattern!r} is not a valid regular expression: {error}; the syntax is that of RE2, which has neither"
                " look-around nor back-references, and so never hangs"
            ) from error
    elif pattern != "*" and not pattern.startswith("glob:") and _PATTERN_SIGNS.intersection(pattern):
        place.warn(
            f"{pattern!r} is looked for in tensor names as it is, and will not be found; for a pattern write "
            f"'glob:{pattern}' or 'regex:...'"
        )


def _parse_gradient(place: Place, parameter: Parameter) -> tuple[Value, ...]:
    return tuple(_parse_value(element, parameter) for element in place.elements())


def _parse_value(place: Place, parameter: Parameter) -> Value:
    """Return a single value; YAML 1.1 reads `1e-5` and the like as strings, so numbers in strings are numbers here."""
    value = place.value
    converted: Value | None = None
    if parameter.type is bool:
        converted = _to_bool(value)
    elif parameter.type is str:
        converted = value if isinstance(value, str) else None
        if parameter.choices and converted not in parameter.choices:
            hint = (
                suggest(converted, parameter.choices) if converted else f"it is one of {', '.join(parameter.choices)}"
            )
            raise place.error(f"{shown(value)} is given; {hint}")
    elif not isinstance(value, bool):
        number = _to_float(value)
        if number is not None and not math.isfinite(number):
            raise place.error(f"{shown(value)} is given, a finite number is needed")
        if parameter.type is float:
            converted = number
        elif number is not None and number.is_integer():
            converted = value if isinstance(value, int) else int(number)
    if converted is None:
        raise place.error(f"{shown(value)} is given, {_WANTED[parameter.type]} is needed")
    return converted


_WANTED: Mapping[type[Value], str] = {
    float: "a number (or a list of numbers, or of {filter, value} entries)",
    int: "a whole number",
    bool: "true or false",
    str: "a string",
}


def _to_float(value: object) -> float | None:
    """Return a number, also from a string; None for anything else."""
    try:
        return float(value) if isinstance(value, int | float | str) else None
    except ValueError:
        return None
    except OverflowError:
        return math.inf


def _to_bool(value: object) -> bool | None:
    if isinstance(value, str):
        return BOOLS.get(value.lower())
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else None
