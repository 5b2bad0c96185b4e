"""`models` as checkpoints of one training run: found by a pattern, the latest of them, weighted by a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.find import FoundModel
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.values import Rule, Setting, Settings
from raymerge.pipeline.messages import shown, suggest

SCHEDULES = ("uniform", "linear", "exponential", "minus-sqrt")
RUN_KEYS = frozenset({"glob", "steps", "every", "last", "schedule", "decay"})
"""Keys of a mapping under `models`."""

_DECAY = 0.9
_WEIGHT = "weight"


FindModels = Callable[[str], Sequence[FoundModel]]
"""Finds the models that match a pattern, in the order of their steps."""


def parse_run(
    place: Place, op: Op | None, common: Settings, find: FindModels | None, base: ModelRef | None
) -> Iterator[tuple[ModelRef, Settings]]:
    """Yield the checkpoints that are described, in the order of their steps, with their own parameters.

    Args:
        place: of the mapping.
        op: the merge method; None where there is an error about it.
        common: parameters for all models.
        find: finds models; None where no stores are at hand.
        base: the base model, which is left out where the method has one.

    Raises:
        ConfigError: nothing matches, or a value makes no sense.
    """
    place.check_keys(sorted(RUN_KEYS))
    if place.get("glob").value is None:
        raise place.missing("glob", "is missing; give a pattern such as `s3://bucket/run/step-*`")
    pattern = place.get("glob").text()
    if find is None:
        raise place.get("glob").error("cannot be looked up here; list the models")
    every = find(pattern)
    if not every:
        raise place.get("glob").error(f"no directory with a config.json matches {pattern!r}")
    if op is not None and op.base is not Base.INPUT:
        every = [model for model in every if ModelRef(model.path) != base]
    found = _select(place, every)
    written = place.get("schedule")
    if written.value is None and (op is None or _WEIGHT in common or not _takes_weights(op)):
        if place.get("decay").value is not None:
            raise place.get("decay").error("belongs to `schedule: exponential`")
        weights = None
    else:
        weights = make_weights(_parse_schedule(place), len(found), _parse_decay(place))
        if op is not None and not _takes_weights(op):
            raise written.error(f"{op.name} has no {_WEIGHT!r} for each model; leave the schedule out")
        if _WEIGHT in common:
            raise written.error(f"gives every model a {_WEIGHT!r}, and so do `parameters`; leave one out")
    for position, model in enumerate(found):
        own = {} if weights is None else {_WEIGHT: Setting((Rule(None, (weights[position],)),))}
        yield ModelRef(model.path), own


def make_weights(schedule: str, num_models: int, decay: float = _DECAY) -> list[float]:
    """Return the weight of each checkpoint, the earliest first; they sum to 1.

    Merged by c_0 ... c_(N-1), checkpoints are what training would have come to if the updates between checkpoints
    j - 1 and j had had the share w_j = c_j + ... + c_(N-1) of the learning rate: c_j = w_j - w_(j+1).

    - `uniform`: 1 / N; a linear decay of the learning rate, w_j = 1 - j / N.
    - `minus-sqrt`: sqrt((j + 1) / N) - sqrt(j / N); the decay w_j = 1 - sqrt(j / N).
    - `linear`: in proportion to j + 1.
    - `exponential`: in proportion to decay^(N - 1 - j), a moving average.

    Source: Tian et al. 2025, "WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging", theorem 3.1; `linear` and
    `exponential` as WMA and EMA in Li et al. 2025, "Model Merging in Pre-training of Large Language Models", section 3.

    >>> [round(weight, 4) for weight in make_weights("minus-sqrt", 4)]
    [0.5, 0.2071, 0.1589, 0.134]
    >>> make_weights("linear", 4)
    [0.1, 0.2, 0.3, 0.4]
    """
    if schedule == "minus-sqrt":
        roots = [math.sqrt(j / num_models) for j in range(num_models + 1)]
        return [after - before for before, after in pairwise(roots)]
    shares = {
        "uniform": [1.0] * num_models,
        "linear": [j + 1.0 for j in range(num_models)],
        "exponential": [decay ** (num_models - 1 - j) for j in range(num_models)],
    }[schedule]
    total = sum(shares)
    return [share / total for share in shares]


def _select(place: Place, found: Sequence[FoundModel]) -> Sequence[FoundModel]:
    steps = place.get("steps")
    if steps.value is not None:
        first, last = _parse_steps(steps)
        if without := [model.path for model in found if model.step is None]:
            raise steps.error(f"{without[0]} has no number where the pattern has its wildcards; leave `steps` out")
        chosen = [model for model in found if model.step is not None and first <= model.step <= last]
        if not chosen:
            there = ", ".join(str(model.step) for model in found[:8]) + (", ..." if found[8:] else "")
            raise steps.error(f"none of the steps that there are ({there}) is from {first} to {last}")
        found = chosen
    every, most = (_parse_count(place.get(name), default) for name, default in (("every", 1), ("last", len(found))))
    return found[::-1][::every][:most][::-1]


def _parse_steps(place: Place) -> tuple[int, int]:
    match place.value:
        case [int() as first, int() as last] if 0 <= first <= last:
            return first, last
    raise place.error(f"{shown(place.value)} is given; write [first, last], both included, such as [8000, 12000]")


def _parse_count(place: Place, default: int) -> int:
    if place.value is None:
        return default
    if not isinstance(place.value, int) or isinstance(place.value, bool) or place.value < 1:
        raise place.error(f"{shown(place.value)} is given, a whole number from 1 on is needed")
    return place.value


def _parse_schedule(place: Place) -> str:
    written = place.get("schedule")
    name = "uniform" if written.value is None else written.text()
    if name not in SCHEDULES:
        raise written.error(f"{name!r} is unknown; {suggest(name, SCHEDULES)}")
    if name != "exponential" and place.get("decay").value is not None:
        raise place.get("decay").error("belongs to `schedule: exponential`")
    return name


def _parse_decay(place: Place) -> float:
    written = place.get("decay")
    value = _DECAY if written.value is None else written.value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
        raise written.error(f"{shown(value)} is given, a number above 0 and up to 1 is needed")
    return float(value)


def _takes_weights(op: Op) -> bool:
    return any(parameter.name == _WEIGHT and parameter.per_model for parameter in op.parameters)
