"""The curve as a table: CSV for all views, and text for the terminal."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from io import StringIO

from raymerge.pipeline.curve.formats import format_count, format_setting, format_share
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.types import Model, Score
from raymerge.pipeline.messages import counted, escaped

_FIGURES = (
    *("accuracy", "accuracy_low", "accuracy_high", "loss", "loss_low", "loss_high"),
    *("tokens", "tokens_low", "tokens_high", "median_tokens", "p95_tokens", "thinking", "cut_off", "num_items"),
)
_FORMULA_SIGNS = ("=", "+", "-", "@", "\t", "\r")
"""Text that begins with one of these is a formula to spreadsheets."""
_MAX_LINES = 40
"""Lines of the table in the terminal."""


def make_csv(curve: Curve) -> str:
    """Return a row for each model in each view, of models without a score too."""
    out = StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["view", "model", "kind", *map(_guard, curve.paths), *_FIGURES, "on_front", "dominated_by", "chosen", "missing"]
    )
    for view, found in zip(curve.views, curve.findings, strict=True):
        for model in curve.models:
            settings = [model.settings.get(path, "") for path in curve.paths]
            writer.writerow(
                [
                    _guard(view.title),
                    _guard(model.name),
                    model.kind,
                    *(each if isinstance(each, int | float) else _guard(format_setting(each)) for each in settings),
                    *_list_figures(view.scores.get(model.name)),
                    "yes" if model.name in found.front else "",
                    _guard("; ".join(found.dominators.get(model.name, ()))),
                    "yes" if curve.choice and curve.choice.model == model.name else "",
                    _guard(view.gaps.get(model.name, "")),
                ]
            )
    return out.getvalue()


def _list_figures(score: Score | None) -> list[object]:
    if score is None:
        return [""] * len(_FIGURES)
    intervals = [
        ("", "", "") if each is None else (each.mean, each.low, each.high) if each.has_interval else (each.mean, "", "")
        for each in (score.accuracy, score.loss)
    ]
    counts = (score.tokens, score.tokens_low, score.tokens_high, score.median_tokens, score.p95_tokens)
    return [*intervals[0], *intervals[1], *counts, score.thinking, score.cut_off, score.num_items]


def format_table(curve: Curve) -> str:
    """Return the first view as a table of text; of very many models the front, the parents and the chosen one."""
    view, found = curve.views[0], curve.findings[0]
    chosen = curve.choice.model if curve.choice else ""
    scored = [model for model in curve.models if model.name in view.scores]
    shown = [
        model
        for model in scored
        if len(scored) <= _MAX_LINES or model.kind == "parent" or model.name in (*found.front, chosen)
    ]
    columns = list(_list_columns(curve, shown))
    widths = [max(len(cell) for cell in column) for column in columns]
    lines = [
        "  ".join(
            cell.ljust(width) if not index or index == len(columns) - 1 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ).rstrip()
        for cells in zip(*columns, strict=True)
    ]
    if len(shown) < len(scored):
        lines.append(f"and {counted(len(scored) - len(shown), 'further model')}, in curve.csv")
    return "\n".join([view.title, *(f"  {line}" for line in lines)])


def _list_columns(curve: Curve, models: Sequence[Model]) -> Iterator[list[str]]:
    """Yield the columns that have anything in them, each with its title."""
    view, found = curve.views[0], curve.findings[0]
    chosen = curve.choice.model if curve.choice else ""
    scores = [view.scores[model.name] for model in models]
    estimates = [view.estimate(model.name) for model in models]
    yield ["model", *(escaped(model.name) for model in models)]
    if view.measure == "accuracy":
        yield ["accuracy", *(format_share(each.mean) for each in estimates)]
        intervals = [
            f"{100 * each.low:.1f} to {100 * each.high:.1f}" if each.has_interval else "" for each in estimates
        ]
    else:
        yield ["loss", *(f"{each.mean:.4f}" for each in estimates)]
        intervals = [f"{each.low:.4f} to {each.high:.4f}" if each.has_interval else "" for each in estimates]
    for title, texts in (
        ("95% interval", intervals),
        ("tokens", [format_count(score.tokens) for score in scores]),
        ("95% interval", [_format_interval(score) for score in scores]),
        ("p95", [format_count(score.p95_tokens) for score in scores]),
        ("thinking", ["" if score.thinking is None else f"{100 * score.thinking:.0f}%" for score in scores]),
        ("cut off", ["" if score.cut_off is None else f"{100 * score.cut_off:.0f}%" for score in scores]),
    ):
        if any(texts):
            yield [title, *texts]
    yield [
        "",
        *(
            ", ".join(
                [
                    *([] if model.kind == "point" else ["parent" if model.kind == "parent" else "not of the spectrum"]),
                    *(["front"] if model.name in found.front else []),
                    *(["<- chosen"] if model.name == chosen else []),
                ]
            )
            for model in models
        ),
    ]


def _format_interval(score: Score) -> str:
    """Return the interval of the mean tokens; empty where there is none."""
    if score.tokens_low is None or score.tokens_high is None:
        return ""
    return f"{format_count(score.tokens_low)} to {format_count(score.tokens_high)}"


def _guard(text: str) -> str:
    """Return text that spreadsheets take for text."""
    return f"'{text}" if text.startswith(_FORMULA_SIGNS) else text
