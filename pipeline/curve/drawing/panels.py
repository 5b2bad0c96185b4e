"""Which charts a view has, and what data they draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from raymerge.pipeline.curve.drawing.rows import KEY, Row, make_rows
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.types import Kind

MODELS, FRONT, JUMPS = "models", "front", "jumps"
"""Names of the data: a row for each model, the front's corners, and where the share of thinking answers jumps."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One chart: which fields of the models it shows."""

    title: str
    x: Literal["tokens", "value", "name"]
    y: Literal["mean", "thinking", "tokens"]
    path: str
    """The parameter on the x axis, if `value` is there."""


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
    return tuple(panels)


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
