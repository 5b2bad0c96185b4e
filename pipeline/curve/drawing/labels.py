"""Places of names in the chart, so that they cover neither each other nor other points."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Side = Literal["above", "right", "left", "below"]

_SIDES: tuple[Side, ...] = ("above", "right", "left", "below")
"""The better ones first."""

WIDTH, HEIGHT = 720, 400
"""Size of the chart that names are placed for, in pixels."""
_SIGN_WIDTH, _LINE_HEIGHT = 6.6, 14
_DISTANCE = 10
"""From the centre of a point to its name, in pixels."""
_POINT = 5
"""Half the size of a point, in pixels."""
_MAX_SIGNS = 40

Box = tuple[float, float, float, float]
"""Left, top, right, bottom."""


@dataclass(frozen=True, slots=True)
class Spot:
    """A point of the chart, in the units of its axes."""

    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Label:
    """A name beside a point."""

    text: str
    side: Side
    is_major: bool
    """Whether it is written even where there is little room."""


def place_labels(spots: Mapping[str, Spot], wanted: Sequence[str], *, major: Collection[str]) -> dict[str, Label]:
    """Return the names that find room, each on the first side of its point that is free; major ones are all there.

    Args:
        spots: all points that are drawn, by name.
        wanted: whose names are to be written, the most important ones first.
        major: those that must be.
    """
    pixels = _scale(spots)
    taken = [(x - _POINT, y - _POINT, x + _POINT, y + _POINT) for x, y in pixels.values()]
    labels: dict[str, Label] = {}
    for name in wanted:
        text = name if len(name) <= _MAX_SIGNS else f"{name[: _MAX_SIGNS - 1]}…"
        boxes = {side: _place(*pixels[name], side, len(text)) for side in _SIDES}
        inside = [side for side, box in boxes.items() if box[0] >= 0 and box[2] <= WIDTH and box[1] >= -20]
        free = [side for side in inside if not any(_overlap(boxes[side], other) for other in taken)]
        if not free and name not in major:
            continue
        side = next(iter([*free, *inside, _SIDES[0]]))
        taken.append(boxes[side])
        labels[name] = Label(text, side, name in major)
    return labels


def _scale(spots: Mapping[str, Spot]) -> dict[str, tuple[float, float]]:
    """Return where points are in pixels, from the top left."""
    if not spots:
        return {}
    left, right = min(spot.x for spot in spots.values()), max(spot.x for spot in spots.values())
    low, high = min(spot.y for spot in spots.values()), max(spot.y for spot in spots.values())
    return {
        name: (
            WIDTH * (spot.x - left) / (right - left or 1.0),
            HEIGHT * (high - spot.y) / (high - low or 1.0),
        )
        for name, spot in spots.items()
    }


def _place(x: float, y: float, side: Side, num_signs: int) -> Box:
    width = num_signs * _SIGN_WIDTH
    if side in ("above", "below"):
        middle = y + (-_DISTANCE - _LINE_HEIGHT / 2 if side == "above" else _DISTANCE + _LINE_HEIGHT / 2)
        return x - width / 2, middle - _LINE_HEIGHT / 2, x + width / 2, middle + _LINE_HEIGHT / 2
    start = x + _DISTANCE if side == "right" else x - _DISTANCE - width
    return start, y - _LINE_HEIGHT / 2, start + width, y + _LINE_HEIGHT / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]
