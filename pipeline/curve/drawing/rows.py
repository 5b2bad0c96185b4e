"""The data of the charts: one row for each model that a view scores, of plain JSON values."""

from __future__ import annotations

from collections.abc import Mapping

from raymerge.pipeline.curve.drawing.labels import Label, Side, Spot, place_labels
from raymerge.pipeline.curve.formats import format_count, format_estimate, format_settings, format_share, format_tokens
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.sentences import describe_score
from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Kind, Model, View

Row = dict[str, object]

KEY: Mapping[Kind, str] = {"parent": "parent", "other": "other model"}
"""Names of what is no series, in a chart's key."""
_SIDES: Mapping[Side, tuple[str, int, int]] = {
    "above": ("center", 0, -1),
    "below": ("center", 0, 1),
    "right": ("left", 1, 0),
    "left": ("right", -1, 0),
}
"""Alignment of a name on each side of its point, and the direction from the point."""
_MAX_SIGNS = 12
"""Letters of a name that is written in a narrow window as well."""
_MAX_LABELS = 16
"""Names of points; more would hide the points."""


def list_names(series: tuple[Series, ...]) -> list[str]:
    """Return the names of the series as the key of a chart has them."""
    return [name_series(each) for each in series]


def name_series(series: Series) -> str:
    """Return a name for a series, if it has none: what its points differ in."""
    return series.name or (f"points, by {series.path}" if series.path else "points")


def make_rows(curve: Curve, index: int) -> list[Row]:
    """Return a row for each model with a score in a view.

    Args:
        curve: all of it.
        index: of the view.
    """
    view, found = curve.views[index], curve.findings[index]
    placed = {
        name: (name_series(series), order, series.values[order] if series.values else None, series.is_line)
        for series in curve.series
        for order, name in enumerate(series.points)
    }
    chosen = curve.choice.model if curve.choice else ""
    labels = _label_models(curve, view, found.front, chosen)
    rows = []
    for model in curve.models:
        if model.name not in view.scores:
            continue
        series, order, value, is_line = placed.get(model.name) or (KEY[model.kind], 0, None, False)
        rows.append(
            {
                "name": model.name,
                "kind": model.kind,
                "series": series,
                "order": order,
                "joined": is_line,
                "value": value,
                "chosen": model.name == chosen,
                "front": model.name in found.front,
                **_list_figures(view, model.name),
                **_list_words(view, model),
                **_list_label(labels.get(model.name), is_ringed=model.name == chosen),
            }
        )
    return rows


def _list_figures(view: View, name: str) -> Row:
    """Return the numbers that are drawn; shares in percent."""
    score, estimate = view.scores[name], view.estimate(name)
    factor = 100 if view.measure == "accuracy" else 1
    return {
        "mean": factor * estimate.mean,
        "low": factor * estimate.low,
        "high": factor * estimate.high,
        "tokens": score.tokens,
        "thinking": None if score.thinking is None else 100 * score.thinking,
    }


def _list_words(view: View, model: Model) -> Row:
    """Return what is shown beside a model, and read out in its place."""
    score = view.scores[model.name]
    settings = format_settings(model.settings)
    shown = {
        "title": model.name,
        "settings": settings or {"parent": "a parent", "other": "not of the spectrum", "point": ""}[model.kind],
        view.measure: format_estimate(view.estimate(model.name), view.measure).removeprefix("loss "),
        "tokens": format_count(score.tokens),
        "95% of answers": "" if score.p95_tokens is None else f"at most {format_tokens(score.p95_tokens)}",
        "thinking": "" if score.thinking is None else f"{format_share(score.thinking)} of answers",
        "cut off": "" if score.cut_off is None else f"{format_share(score.cut_off)} of answers",
    }
    return {
        "said": f"{model.name}: {describe_score(score, view.measure)}",
        "shown": {name: text for name, text in shown.items() if text},
    }


def _label_models(curve: Curve, view: View, front: tuple[str, ...], chosen: str) -> dict[str, Label]:
    """Return where names are written: of the choice and what is no point, and of a single line's front and ends."""
    costs = view.costs()
    spots = {name: Spot(tokens, -cost) for name, (tokens, cost) in costs.items()}
    others = [model.name for model in curve.models if model.kind != "point"]
    ends = [name for series in curve.series if series.is_line for name in (series.points[0], series.points[-1])]
    points = (*front, *ends) if len(curve.series) == 1 else ()
    wanted = [name for name in dict.fromkeys([chosen, *others, *points]) if name in spots]
    return place_labels(spots, wanted[: len(others) + _MAX_LABELS], major={chosen, *others})


def _list_label(label: Label | None, *, is_ringed: bool) -> Row:
    if label is None:
        return {"label": ""}
    align, across, down = _SIDES[label.side]
    distance = 18 if is_ringed else 12
    return {
        "label": label.text,
        "major": label.is_major and len(label.text) <= _MAX_SIGNS,
        "align": align,
        "dx": across * distance,
        "dy": down * distance,
    }
