"""The values of an axis of a sweep: lists, and ranges in exact decimal arithmetic."""

from __future__ import annotations

import re
from decimal import Decimal

import yaml

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import shown

MAX_POINTS = 1000
"""Most models of one sweep."""

_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ENDLESS = re.compile(r"[+-]?\.?(inf|infinity|nan)", re.IGNORECASE)
_MAX_DIGITS = 40
"""Digits of a number in a range; so many keep decimal arithmetic exact and quick."""


def parse_values(where: str, text: str) -> list[object]:
    """Return the values that a text lists, or those of a range `start:stop:step`, which holds its stop.

    >>> parse_values("t", "0.1:0.4:0.1"), parse_values("t", "0.3, [0, 1], true"), parse_values("k", "8:2:-3")
    ([0.1, 0.2, 0.3, 0.4], [0.3, [0, 1], True], [8, 5, 2])

    Args:
        where: begins messages.
        text: what is written there.

    Raises:
        ConfigError: nothing is listed, it is no YAML, or the range is none, is empty or has too many values.
    """
    if is_range(text):
        return expand_range(where, text)
    try:
        values = yaml.safe_load(f"[{text}]")
    except yaml.YAMLError:
        values = None
    if not isinstance(values, list) or not values or None in values:
        raise ConfigError(
            f"{where}: {shown(text)} is given; write values as 0.3,0.5,0.7, a range as 0.1:0.9:0.1 (start:stop:step),"
            " or a gradient as [0,1]"
        )
    return [to_number(value) for value in values]


def is_range(text: str) -> bool:
    """Tell whether a text is meant as a range: numbers with colons between them.

    >>> is_range("0:1:0.1"), is_range("0:1"), is_range("s3://bucket/a"), is_range("0.5")
    (True, True, False, False)
    """
    parts = [part.strip() for part in text.split(":")]
    return len(parts) > 1 and all(_NUMBER.fullmatch(part) or _ENDLESS.fullmatch(part) for part in parts)


def expand_range(where: str, text: str) -> list[object]:
    """Return the values of a range, the stop among them if a step leads to it.

    Raises:
        ConfigError: it has no step, its step is 0 or leads away from the stop, or it has too many values.
    """
    parts = [part.strip() for part in text.split(":")]
    if len(parts) != 3:
        example = "0.1" if len(parts) == 2 else "1"
        raise ConfigError(
            f"{where}: {text} is no range; write start:stop:step, such as {parts[0]}:{parts[1]}:{example}"
        )
    if endless := [part for part in parts if _ENDLESS.fullmatch(part)]:
        raise ConfigError(f"{where}: the range {text} has {endless[0]}, and would never end; give a finite number")
    if any(len(part) > _MAX_DIGITS or abs(Decimal(part).adjusted()) > _MAX_DIGITS for part in parts):
        raise ConfigError(f"{where}: {text} has a number out of reason")
    start, stop, step = (Decimal(part) for part in parts)
    if not step:
        raise ConfigError(f"{where}: the range {text} has the step 0, and would never end; give another step")
    if (stop - start) * step < 0:
        raise ConfigError(
            f"{where}: the range {text} leads away from {parts[1]}, and would never end; write {_turn(parts)}"
        )
    num_steps = int((stop - start) / step)
    if num_steps >= MAX_POINTS:
        raise ConfigError(
            f"{where}: the range {text} has {num_steps + 1:,} values, and a sweep at most {MAX_POINTS:,} models; make"
            " the step larger"
        )
    is_whole = all(re.fullmatch(r"[+-]?\d+", part) for part in parts)
    values = [start + k * step for k in range(num_steps + 1)]
    return [int(value) if is_whole else float(value) for value in values]


def to_number(value: object) -> object:
    """Return a value with the numbers among its strings as numbers: YAML 1.1 takes `1e-5` for a string.

    >>> to_number(["1e-5", "ties", 3])
    [1e-05, 'ties', 3]
    """
    if isinstance(value, list):
        return [to_number(item) for item in value]
    if isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    return value


def _turn(parts: list[str]) -> str:
    start, stop, step = parts
    return f"{start}:{stop}:{step.removeprefix('-') if step.startswith('-') else f'-{step}'}"
