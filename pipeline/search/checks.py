"""The values of a space, checked by plans before anything is merged: the headers of the models are read for it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from raymerge.pipeline.search.space import Choices, Dimension, Space
from raymerge.pipeline.search.study import Settings, round_value

_MAX_CHOICES = 32
"""Values of a list that are planned; of longer ones, the first."""
_NUM_MIXED = 12
_MAX_SWEEPS = 4
_MAX_TRIED = 4
"""Settings that a value is tried with before it is taken to be wrong."""
_NUDGE = 1e-3
"""Share of a range by which its ends are moved inwards where they are refused themselves: it may be meant as open."""

Explain = Callable[[Mapping[str, Settings]], Mapping[str, str]]
"""Returns why settings, by their names, are refused; empty texts for those that are not."""


@dataclass(frozen=True, slots=True)
class _End:
    """A value at the end of a dimension, or of its list, with what may stand for it."""

    path: str
    values: tuple[object, ...]
    label: str


def find_wrong_values(space: Space, bases: Sequence[Settings], explain: Explain) -> list[tuple[str, str]]:
    """Return the values that no model can be merged with, each as its path and what is said of it.

    A value is wrong if it is refused together with each of some settings of the other paths that are not, and with each
    value that another path may have in one of these.

    Args:
        space: what may be proposed.
        bases: such settings; where all of them are refused, nothing is found.
        explain: says why settings are refused.
    """
    refused = explain({f"base-{k}": base for k, base in enumerate(bases)})
    working = [base for k, base in enumerate(bases) if not refused[f"base-{k}"]]
    if not working:
        return []
    ends = [end for path, dimension in space.items() for end in _list_ends(path, dimension)]
    left = [end for end in ends if not any(base[end.path] == end.values[0] for base in working)]
    errors: dict[str, str] = {}
    for base in working[:_MAX_TRIED]:
        for number in range(2):
            tried = [end for end in left if number < len(end.values)]
            found = explain({f"value-{k}": {**base, end.path: end.values[number]} for k, end in enumerate(tried)})
            said = {end.label: found[f"value-{k}"] for k, end in enumerate(tried)}
            for label, error in said.items():
                errors.setdefault(label, error)
            left = [end for end in left if said.get(end.label, "refused")]
    left = [end for end in left if not _goes_with_another(end, ends, working[0], explain)]
    return [(end.path, f"{end.label}: {_drop_warnings(errors[end.label])}") for end in left]


def _goes_with_another(end: _End, ends: Sequence[_End], base: Settings, explain: Explain) -> bool:
    """Tell whether there is a value of another path with which a value is not refused."""
    tried = (
        {**base, other.path: other.values[-1], end.path: end.values[-1]} for other in ends if other.path != end.path
    )
    return any(not explain({"value": settings})["value"] for settings in tried)


def _drop_warnings(error: str) -> str:
    return "\n".join(line for line in error.splitlines() if not line.startswith("warning: "))


def list_bases(space: Space, explain: Explain) -> list[Settings]:
    """Return a few settings that are not refused: all at their lowest, in the middle, at their highest, and mixed.

    Where all of these are refused, each path in turn gets the value with the fewest lines of reasons.
    """
    ends = {path: [end.values[0] for end in _list_ends(path, dimension)] for path, dimension in space.items()}
    middles = {path: _find_middle(dimension) for path, dimension in space.items()}
    draw = random.Random(0)
    bases = [
        {path: own[0] for path, own in ends.items()},
        middles,
        {path: own[-1] for path, own in ends.items()},
        *({path: draw.choice([middles[path], *own]) for path, own in ends.items()} for _ in range(_NUM_MIXED)),
    ]
    refused = explain({f"base-{k}": base for k, base in enumerate(bases)})
    if working := [base for k, base in enumerate(bases) if not refused[f"base-{k}"]]:
        return list(working)
    for k, base in enumerate(bases):
        if climbed := _climb(ends, base, refused[f"base-{k}"], explain):
            return [climbed]
    return []


def _climb(ends: Mapping[str, Sequence[object]], base: Settings, error: str, explain: Explain) -> Settings | None:
    """Return settings that are not refused: from others, by changes that leave fewer lines of reasons."""
    for _ in range(_MAX_SWEEPS):
        before = error
        for path, own in ends.items():
            for value in own:
                found = explain({"base": {**base, path: value}})["base"]
                if not found:
                    return {**base, path: value}
                if _count_lines(found) < _count_lines(error):
                    base, error = {**base, path: value}, found
        if error == before:
            break
    return None


def _count_lines(error: str) -> int:
    return len(_drop_warnings(error).splitlines())


def _find_middle(dimension: Dimension) -> object:
    if isinstance(dimension, Choices):
        return json.loads(dimension.values[len(dimension.values) // 2])
    if dimension.step is not None:
        return round_value(
            dimension, dimension.low + dimension.step * ((dimension.high - dimension.low) // (2 * dimension.step))
        )
    return round_value(dimension, (dimension.low + dimension.high) / 2)


def _list_ends(path: str, dimension: Dimension) -> Sequence[_End]:
    if isinstance(dimension, Choices):
        values = dimension.values[:_MAX_CHOICES]
        return [_End(path, (json.loads(value),), f"search.parameters.{path}: {value}") for value in values]
    nudge = 0.0 if dimension.step is not None else _NUDGE * (dimension.high - dimension.low)
    ends = []
    for name, value, inner in (("min", dimension.low, nudge), ("max", dimension.high, -nudge)):
        found = dict.fromkeys((round_value(dimension, value), round_value(dimension, value + inner)))
        ends.append(_End(path, tuple(found), f"search.parameters.{path}: {name} {value:g}"))
    return ends
