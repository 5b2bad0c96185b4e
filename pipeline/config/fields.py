"""Single fields of a config, from what is written to what it means."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.pipeline.checkpoint.dtypes import DTYPE_NAMES, OUTPUT_DTYPES
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.messages import shown, suggest

SENSITIVE_TO_ROUNDING = (
    "*.A_log",
    "*.dt_bias",
    "*.D",
    "*correction_bias",
    "*expert_bias",
    "*router*bias",
    "*gate.bias",
    "*layer_scale*",
    "*.attn_sink*",
    "*.sinks",
)
"""Tensors that models keep in float32 on purpose: decays of state-space layers, biases of routers, scales of layers."""


_RANGE = "write [start, stop], the first layer and the one after the last, such as [0, 32]"


def parse_layer_range(place: Place, misspelt: PlaceError | None) -> tuple[int, int] | None:
    """Return a range of layers, half-open: [start, stop); it may be empty. None, for all layers, where none is given.

    Raises:
        PlaceError: `misspelt`, if nothing is here and that says why; or it is no such range.
    """
    if misspelt and place.value is None:
        raise misspelt
    if place.value is None:
        return None
    match place.value:
        case [start, stop] if (first := _to_whole(start)) is not None and (last := _to_whole(stop)) is not None:
            if 0 <= first <= last:
                return first, last
            raise place.error(f"[{first}, {last}] holds no layers; {_RANGE}")
    raise place.error(f"{shown(place.value)} is given; {_RANGE}")


def _to_whole(value: object) -> int | None:
    """Return a whole number, also where it is written as `"8"` or `8.0`; None for anything else."""
    if isinstance(value, str) and value.isascii() and value.isdecimal():
        return int(value)
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if isinstance(value, int | float) and (is_whole or type(value) is int) else None


def check_empty(slices: Place, ranges: Sequence[tuple[int, int] | None]) -> None:
    """Refuse slices without layers, but for a first or last one, which gives what stands around the layers.

    Args:
        slices: as written.
        ranges: the layers of each; None where they could not be read, or are all of a model.
    """
    are_layers = any(found is None or found[0] < found[1] for found in ranges)
    for number, (part, found) in enumerate(zip(slices.elements(), ranges, strict=True)):
        if found is None or found[0] < found[1]:
            continue
        where = next(part.get("sources").elements()).get("layer_range")
        side = {0: "before", len(ranges) - 1: "after"}.get(number)
        if side and are_layers:
            where.warn(f"{list(found)} holds no layers: of these models comes what stands {side} the layers, no more")
        else:
            where.note(where.error(f"{list(found)} holds no layers; {_RANGE}"))


def parse_name(place: Place) -> str | None:
    """Return the name of a merge; None where it has none."""
    return None if place.value is None else place.text()


def parse_dtype(place: Place) -> str | None:
    """Return a dtype as a safetensors header has it; None where none is given, or `auto`: the models' own."""
    if place.value is None or place.value == "auto":
        return None
    name = place.text().removeprefix("torch.")
    if name not in DTYPE_NAMES:
        advice = suggest(name if "8" not in name else "", OUTPUT_DTYPES, 0.5)
        raise place.error(f"{name!r} is no dtype that a merge can be written in; {advice}")
    return DTYPE_NAMES[name]


def parse_patterns(place: Place) -> tuple[str, ...]:
    """Return patterns of tensor names: those that are listed, or for `true` those that are good for most models."""
    if place.value is None or place.value is False:
        return ()
    if place.value is True:
        return SENSITIVE_TO_ROUNDING
    return tuple(pattern.text() for pattern in place.elements())


def parse_integers(place: Place) -> str:
    """Return the rule for integers that differ between the models."""
    match place.value:
        case None:
            return "equal"
        case "equal" | "donor" | "max" | "sum" as chosen:
            return chosen
    raise place.error(
        f"{shown(place.value)} is given; write `equal` to refuse integers that differ between the models, `donor` to"
        " take those of the base, or else of the first model, or `max` or `sum` of all models"
    )
