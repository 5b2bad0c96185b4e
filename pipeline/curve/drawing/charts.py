"""The charts of a view, as Vega-Lite specifications; their data come from `panels`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import altair as alt

from raymerge.pipeline.curve.drawing.panels import FRONT, JUMPS, MODELS, Panel
from raymerge.pipeline.curve.drawing.rows import KEY
from raymerge.pipeline.curve.types import Kind, Measure

SHAPES = ("circle", "square", "triangle-up", "cross", "triangle-down", "triangle-right")
DASHES = ([1, 0], [7, 3], [2, 3], [9, 3, 2, 3], [4, 2], [12, 4])
"""Series differ in colour, shape and dashes at once."""
_NAME_LIMIT = 260
"""Largest width of names beside a chart and in its key, in pixels."""


@dataclass(frozen=True, slots=True)
class Paint:
    """Colours of a chart, as CSS writes them."""

    ink: str
    muted: str
    grid: str
    front: str
    jump: str
    paper: str
    series: tuple[str, ...]


IN_PRINT = Paint(
    "#1b1f24", "#5a6270", "#e3e6ea", "#9aa3af", "#f3e3b3", "#ffffff",
    ("#0068a8", "#c4500a", "#00805c", "#a64d8a", "#7a6a00", "#55585e"),
)  # fmt: skip
IN_PAGE = Paint(
    "var(--ink)", "var(--muted)", "var(--grid)", "var(--front)", "var(--jump)", "var(--paper)",
    tuple(f"var(--series-{index})" for index in range(len(IN_PRINT.series))),
)  # fmt: skip
"""The page's own colours, which follow its scheme."""


@dataclass(frozen=True, slots=True)
class Look:
    """The look of a chart."""

    paint: Paint
    series: tuple[str, ...]
    """Names in the order of the key."""
    measure: Measure
    width: int | Literal["container"]
    height: int
    kinds: tuple[Kind, ...]
    """Kinds of the models that are no points."""
    has_key: bool = True

    @property
    def title(self) -> str:
        """Title of the axis of the measure."""
        return "Accuracy (%)" if self.measure == "accuracy" else "Loss (nats)"

    @property
    def domain(self) -> list[str]:
        """Entries of the key."""
        return [*self.series, *(KEY[kind] for kind in self.kinds)]

    @property
    def colours(self) -> list[str]:
        """Colour of each entry."""
        colours = self.paint.series
        others = [self.paint.ink if kind == "parent" else self.paint.muted for kind in self.kinds]
        return [*(colours[index % len(colours)] for index in range(len(self.series))), *others]

    @property
    def shapes(self) -> list[str]:
        """Shape of each entry."""
        num = len(SHAPES)
        others = ["diamond" if kind == "parent" else "triangle-left" for kind in self.kinds]
        return [*(SHAPES[(index + index // num) % num] for index in range(len(self.series))), *others]


def draw(look: Look, panel: Panel) -> alt.LayerChart:
    """Return a chart."""
    scales = {name: alt.Scale(domain=list(domain), nice=True, zero=False) for name, domain in panel.domains}
    y = {
        "mean": alt.Y("mean:Q", title=look.title, scale=scales.get("mean", alt.Undefined)),
        "thinking": alt.Y("thinking:Q", title="Answers that think (%)", scale=alt.Scale(domain=[0, 100])),
        "tokens": alt.Y("tokens:Q", title="Tokens, mean", scale=alt.Scale(zero=True)),
    }[panel.y]
    if panel.x == "tokens":
        layers = _draw_tradeoff(look, y, scales.get("tokens", alt.Undefined))
    elif panel.x == "value":
        x = alt.X("value:Q", title=panel.path, scale=alt.Scale(zero=False, padding=12, nice=False))
        layers = [_draw_jumps(look), *_draw_levels(look, y, panel.y), *_draw_models(look, x, y, ["value", panel.y])]
    else:
        layers = _draw_models(
            look, alt.X("name:N", title=None, sort=None, axis=alt.Axis(labelLimit=_NAME_LIMIT)), y, [panel.y]
        )
    return alt.LayerChart(layer=layers, width=look.width, height=look.height)


def _draw_tradeoff(look: Look, y: alt.Y, scale: Any) -> list[alt.Chart]:
    """Return the measure against tokens, with the Pareto front and the names of points."""
    x = alt.X(
        "tokens:Q",
        title="Tokens of an answer, mean",
        scale=scale,
        axis=alt.Axis(tickCount=8),
    )
    corners = alt.Chart(alt.NamedData(FRONT)).encode(x=x, y=y)
    front = corners.mark_line(interpolate="step-after", color=look.paint.front, strokeWidth=5, opacity=0.55)
    return [front, *_draw_models(look, x, y, ["tokens", "mean"]), *_draw_labels(look, x, y)]


def _draw_jumps(look: Look) -> alt.Chart:
    marks = alt.Chart(alt.NamedData(JUMPS)).mark_rect(color=look.paint.jump, opacity=0.5, aria=False)
    spans: alt.Chart = marks.encode(x=alt.X("start:Q"), x2="stop:Q")
    return spans


def _draw_levels(look: Look, y: alt.Y, field: str) -> list[alt.Chart]:
    """Return lines for the models that have no value of the parameter."""
    levels = alt.Chart(alt.NamedData(MODELS)).transform_filter(f"datum.kind != 'point' && isValid(datum.{field})")
    lines = levels.mark_rule(strokeDash=[3, 3], color=look.paint.muted, aria=False)
    limit = 100 if look.width == "container" else _NAME_LIMIT  # a page may be narrow, and its table has the names
    names = levels.mark_text(align="left", dx=6, limit=limit, color=look.paint.muted, aria=False)
    return [lines.encode(y=y), names.encode(x=alt.value("width"), y=y, text="name:N")]


def finish(chart: alt.LayerChart | alt.VConcatChart, paint: Paint, *, columns: int) -> dict[str, object]:
    """Return the specification of a chart, with the colours and letters of all charts.

    Args:
        chart: what was drawn.
        paint: its colours.
        columns: of the key.
    """
    font = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
    configured = (
        chart.configure(font=font, background=paint.paper)
        .configure_view(stroke=None)
        .configure_axis(
            labelColor=paint.muted,
            titleColor=paint.ink,
            titleFontWeight="normal",
            titleFontSize=13,
            labelFontSize=12,
            gridColor=paint.grid,
            domainColor=paint.muted,
            tickColor=paint.muted,
            titlePadding=10,
            labelFlush=True,
        )
        .configure_legend(
            orient="bottom",
            columns=columns,
            title=None,
            labelColor=paint.ink,
            labelFontSize=12,
            labelLimit=_NAME_LIMIT,
            symbolSize=90,
            symbolStrokeWidth=2,
            padding=8,
        )
        .configure_text(color=paint.ink, fontSize=12)
        .configure_title(
            color=paint.ink, fontSize=14, anchor="start", fontWeight="bold", offset=16, subtitleColor=paint.muted
        )
    )
    spec: dict[str, object] = configured.to_dict(format="vega-lite")
    return spec


def _draw_models(look: Look, x: alt.X, y: alt.Y, fields: Sequence[str]) -> list[alt.Chart]:
    """Return lines, intervals and points of the models that have both fields."""
    known = alt.Chart(alt.NamedData(MODELS)).transform_filter(" && ".join(f"isValid(datum.{name})" for name in fields))
    key = alt.Legend() if look.has_key else None
    colour = alt.Color("series:N", legend=key, scale=alt.Scale(domain=look.domain, range=look.colours))
    shape = alt.Shape("series:N", legend=key, scale=alt.Scale(domain=look.domain, range=look.shapes))
    dashes = alt.StrokeDash(
        "series:N",
        legend=None,
        scale=alt.Scale(
            domain=list(look.series), range=[DASHES[index % len(DASHES)] for index in range(len(look.series))]
        ),
    )
    lines = (
        known.transform_filter("datum.joined")
        .mark_line(strokeWidth=1.5, opacity=0.75, aria=False)
        .encode(x=x, y=y, color=colour, strokeDash=dashes, order="order:Q", detail="series:N")
    )
    bars = known.mark_rule(opacity=0.5, aria=False).encode(x=x, y=alt.Y("low:Q"), y2="high:Q", color=colour)
    rings = (
        known.transform_filter("datum.chosen")
        .mark_point(size=420, color=look.paint.ink, strokeWidth=2, aria=False)
        .encode(x=x, y=y)
    )
    picked = alt.param(name="picked", value="")
    points = (
        known.mark_point(filled=True, opacity=1, stroke=look.paint.paper, strokeWidth=1)
        .encode(
            x=x,
            y=y,
            color=colour,
            shape=shape,
            size=alt.when("datum.name == picked")
            .then(alt.value(340))
            .when("datum.kind == 'point'")
            .then(alt.value(85))
            .otherwise(alt.value(190)),
            tooltip=alt.Tooltip("shown:N"),
            description=alt.Description("said:N"),
        )
        .add_params(picked)
    )
    return [lines, *([bars] if fields[-1] == "mean" else []), rings, points]


def _draw_labels(look: Look, x: alt.X, y: alt.Y) -> list[alt.Chart]:
    """Return the names beside points, each on a ground of its own; in a narrow window those that matter most."""
    narrow = alt.param(name="narrow", value=False)
    known = alt.Chart(alt.NamedData(MODELS)).transform_filter("datum.label != '' && (datum.major || !narrow)")
    align, dx, dy = (alt.ExprRef(f"datum.{name}") for name in ("align", "dx", "dy"))
    ground = known.mark_text(align=align, dx=dx, dy=dy, aria=False, stroke=look.paint.paper, strokeWidth=4)
    text = known.mark_text(align=align, dx=dx, dy=dy, aria=False, color=look.paint.ink)
    return [each.encode(x=x, y=y, text="label:N").add_params(narrow) for each in (ground, text)]
