"""The curve as one HTML page that needs nothing besides itself, and may load nothing."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from raymerge.pipeline.curve.drawing.panels import Panel, list_kinds, list_panels, make_data
from raymerge.pipeline.curve.drawing.rows import list_names
from raymerge.pipeline.curve.formats import format_count, format_setting, format_share
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.sentences import describe_choice, describe_findings, describe_gaps
from raymerge.pipeline.curve.types import Model
from raymerge.pipeline.messages import counted

_HEIGHTS = (440, 240)
"""Heights of the main chart and of the others, in pixels."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell of the table."""

    text: str
    key: str | float
    """Key by which rows are sorted."""


@dataclass(frozen=True, slots=True)
class Line:
    """A row of the table."""

    name: str
    url: str
    notes: tuple[str, ...]
    cells: tuple[Cell, ...]
    is_chosen: bool


@dataclass(frozen=True, slots=True)
class Section:
    """The part of the page for one view."""

    title: str
    charts: tuple[Panel, ...]
    """Titles and notes; their specifications are in the page's data."""
    sentences: tuple[str, ...]
    gaps: tuple[str, ...]
    columns: tuple[str, ...]
    lines: tuple[Line, ...]


def make_page(curve: Curve) -> str:
    """Return the page: what comes from outside is escaped, and its policy forbids other scripts and all requests."""
    import jinja2

    source, style, script = (_read(name) for name in ("page.html", "page.css", "page.js"))
    library = _bundle_vega()
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    num_points = sum(model.kind == "point" for model in curve.models)
    return environment.from_string(source).render(
        name=curve.directory.rstrip("/").rpartition("/")[2],
        curve=curve,
        summary=f"{counted(num_points, 'point')}, {counted(len(curve.views[0].tasks), 'task')}",
        choice=describe_choice(curve.views[0], curve.choice) if curve.choice else (),
        chosen=curve.chosen,
        settings={path: format_setting(value) for path, value in curve.chosen.settings.items()} if curve.chosen else {},
        sections=[_make_section(curve, index) for index in range(len(curve.views))],
        data=_embed_json(_make_data(curve)),
        style=style,
        script=script,
        library=library,
        hashes=[_hash(script), _hash(library)],
    )


def _make_section(curve: Curve, index: int) -> Section:
    view, found = curve.views[index], curve.findings[index]
    models = [model for model in curve.models if model.name in view.scores]
    is_accuracy = view.measure == "accuracy"
    columns = ("Model", *curve.paths, "Accuracy" if is_accuracy else "Loss", "95% interval", "Tokens", "Median", "p95")
    columns = (*columns, "Thinking", "Cut off")
    lines = [_make_line(curve, index, model) for model in models]
    shown = [0, *(number for number in range(1, len(columns)) if any(line.cells[number - 1].text for line in lines))]
    return Section(
        view.title,
        list_panels(curve, index),
        describe_findings(view, found, curve.models),
        describe_gaps(view),
        tuple(columns[number] for number in shown),
        tuple(replace(line, cells=tuple(line.cells[number - 1] for number in shown[1:])) for line in lines),
    )


def _make_line(curve: Curve, index: int, model: Model) -> Line:
    view, found = curve.views[index], curve.findings[index]
    score, estimate = view.scores[model.name], view.estimate(model.name)
    chosen = curve.choice is not None and curve.choice.model == model.name
    dominators = found.dominators.get(model.name, ())
    if view.measure == "accuracy":
        texts = format_share(estimate.mean), f"{100 * estimate.low:.1f} to {100 * estimate.high:.1f}"
    else:
        texts = f"{estimate.mean:.4f}", f"{estimate.low:.4f} to {estimate.high:.4f}"
    counts = (score.tokens, score.median_tokens, score.p95_tokens)
    shares = (score.thinking, score.cut_off)
    return Line(
        model.name,
        model.url,
        (
            *({"parent": ("parent",), "other": ("not of the spectrum",), "point": ()}[model.kind]),
            *(("chosen",) if chosen else ()),
            *(("Pareto front",) if model.name in found.front else ()),
            *((f"dominated by {dominators[0]}",) if dominators else ()),
        ),
        (
            *(_make_setting(model, path) for path in curve.paths),
            Cell(texts[0], estimate.mean),
            Cell(texts[1] if estimate.has_interval else "", estimate.low),
            *(Cell(format_count(count), -1.0 if count is None else count) for count in counts),
            *(Cell("" if share is None else format_share(share), -1.0 if share is None else share) for share in shares),
        ),
        chosen,
    )


def _make_setting(model: Model, path: str) -> Cell:
    if path not in model.settings:
        return Cell("", "")
    value = model.settings[path]
    text = format_setting(value)
    return Cell(text, float(value) if isinstance(value, int | float) else text)


def _make_data(curve: Curve) -> dict[str, object]:
    """Return what the page's script draws: each view's data, and the number of its set of charts, which views share."""
    from raymerge.pipeline.curve.drawing.charts import IN_PAGE, Look, draw, finish

    series = tuple(list_names(curve.series))
    known: dict[tuple[Look, tuple[Panel, ...]], int] = {}
    charts: list[list[dict[str, object]]] = []
    views = []
    config: object = {}
    for index, view in enumerate(curve.views):
        panels = tuple(replace(panel, note="") for panel in list_panels(curve, index))
        look = Look(IN_PAGE, series, view.measure, "container", _HEIGHTS[0], list_kinds(curve, index))
        if (look, panels) not in known:
            known[look, panels] = len(known)
            small = replace(look, height=_HEIGHTS[1], has_key=False)
            charts.append(
                [
                    finish(draw(small if number else look, panel), IN_PAGE, columns=3)
                    for number, panel in enumerate(panels)
                ]
            )
            config = [spec.pop("config") for spec in charts[-1]].pop()
        views.append({"charts": known[look, panels], "data": make_data(curve, index)})
    return {"config": config, "charts": charts, "views": views}


def _embed_json(value: object) -> str:
    """Return JSON that ends no script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _read(name: str) -> str:
    return files("raymerge.pipeline.curve.drawing").joinpath(name).read_text("utf-8")


@cache
def _bundle_vega() -> str:
    """Return Vega, Vega-Lite and vega-embed as one script."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script


def _hash(script: str) -> str:
    """Return a script's name in a content security policy."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
