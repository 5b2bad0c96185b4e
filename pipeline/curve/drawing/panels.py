"""The charts of a view, and the data that they draw."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raymerge.pipeline.curve.drawing.rows import KEY, Row, make_rows
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.types import Kind

MODELS, FRONT, JUMPS = "models", "front", "jumps"
"""Names of the data: a row for each model, the front's corners, and where the share of thinking answers jumps."""


Domain = tuple[float, float]
"""First and last value of an axis."""
_MARGIN = 0.06
"""Margin of an axis beyond the values, as a share of their range."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: which fields of the models it shows."""

    title: str
    x: Literal["tokens", "value", "name"]
    y: Literal["mean", "thinking", "tokens"]
    path: str
    """The parameter on the x axis, if `value` is there."""
    note: str = ""
    """Explanation of marks that the key does not name; empty if there are none."""
    domains: tuple[tuple[str, Domain], ...] = ()
    """Domains of the axes of `tokens` and `mean`, by name."""


def list_panels(curve: Curve, index: int) -> tuple[Panel, ...]:
    """Return the charts of a view, the main one first."""
    view = curve.views[index]
    path = next((series.path for series in curve.series), "")
    x: Literal["value", "name"] = "value" if path else "name"
    against = f"against {path}" if path else "of each model"
    measure = "Accuracy" if view.measure == "accuracy" else "Loss"
    if view.has_tokens:
        panels = [Panel(f"{measure} against tokens", "tokens", "mean", "")]
    else:
        panels = [Panel(f"{measure} {against}", x, "mean", path)]
    if path and any(score.thinking is not None for score in view.scores.values()):
        panels.append(Panel(f"Thinking answers {against}", x, "thinking", path))
    if path and view.has_tokens:
        panels.append(Panel(f"Tokens {against}", x, "tokens", path))
    domains = tuple(_list_domains(curve, index))
    return tuple(
        replace(panel, note=_describe_marks(curve, index, panel, is_first=not number), domains=domains)
        for number, panel in enumerate(panels)
    )


def find_domain(values: Sequence[float], lowest: float, highest: float) -> Domain:
    """Return the domain of an axis: the values with a margin, which stays within bounds that the values keep.

    >>> find_domain([5, 45, 100], 0, 100), find_domain([50], 0, 100)
    ((0, 100), (47.0, 53.0))
    """
    low, high = min(values), max(values)
    margin = _MARGIN * ((high - low) or abs(high) or 1.0)
    return max(low - margin, min(low, lowest)), min(high + margin, max(high, highest))


def _list_domains(curve: Curve, index: int) -> Iterator[tuple[str, Domain]]:
    view = curve.views[index]
    is_accuracy = view.measure == "accuracy"
    estimates = [view.estimate(name) for name in view.scores]
    means = [(100 if is_accuracy else 1) * end for each in estimates for end in (each.low, each.high)]
    tokens = [score.tokens for score in view.scores.values() if score.tokens is not None]
    if means:
        yield "mean", find_domain(means, 0, 100 if is_accuracy else math.inf)
    if tokens:
        yield "tokens", find_domain(tokens, 0, math.inf)


def _describe_marks(curve: Curve, index: int, panel: Panel, *, is_first: bool) -> str:
    """Explain the marks of a chart; only the first one explains the ring."""
    found = curve.findings[index]
    parts = [
        *(["bars are 95% intervals"] if panel.y == "mean" else []),
        *(["grey steps are the Pareto front"] if panel.x == "tokens" and found.front else []),
        *(["the ring is the choice"] if is_first and curve.choice else []),
        *(["in the yellow band the share of answers that think jumps"] if panel.x == "value" and found.jumps else []),
    ]
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}." if text else ""


def make_data(curve: Curve, index: int) -> dict[str, list[Row]]:
    """Return the data of a view's charts by name."""
    view, found = curve.views[index], curve.findings[index]
    factor = 100 if view.measure == "accuracy" else 1
    front: list[Row] = [
        {"tokens": view.scores[name].tokens, "mean": factor * view.estimate(name).mean} for name in found.front
    ]
    jumps: list[Row] = [{"start": jump.start, "stop": jump.stop} for jump in found.jumps]
    return {MODELS: make_rows(curve, index), FRONT: front, JUMPS: jumps}


def list_kinds(curve: Curve, index: int) -> tuple[Kind, ...]:
    """Return of what kinds the models of a view are that are no points."""
    there = {model.kind for model in curve.models if model.name in curve.views[index].scores}
    return tuple(kind for kind in KEY if kind in there)
