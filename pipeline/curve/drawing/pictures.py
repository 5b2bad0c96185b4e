"""The curve as a picture: one SVG, and the same as PNG."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from raymerge.pipeline.curve.drawing.panels import Panel, list_kinds, list_panels, make_data
from raymerge.pipeline.curve.drawing.rows import list_names
from raymerge.pipeline.curve.results import Curve

_WIDTH, _HEIGHTS = 760, (400, 200)
"""Width of all charts; heights of the main one, and of those below."""
_GAP = 70
"""Between two charts side by side, with the axis of the second."""
_SCALE = 2.0
"""Pixels of the PNG for each of the picture."""


def make_pictures(curve: Curve) -> tuple[str, bytes]:
    """Return the first view of a curve as SVG and as PNG."""
    import vl_convert

    svg: str = vl_convert.vegalite_to_svg(make_picture(curve))
    png: bytes = vl_convert.svg_to_png(svg, scale=_SCALE)
    return svg, png


def make_picture(curve: Curve) -> dict[str, Any]:
    """Return the Vega-Lite specification of the picture."""
    import altair as alt

    from raymerge.pipeline.curve.drawing.charts import IN_PRINT, Look, draw, finish

    series = tuple(list_names(curve.series))
    look = Look(IN_PRINT, series, curve.views[0].measure, _WIDTH, _HEIGHTS[0], list_kinds(curve, 0))
    first, *others = list_panels(curve, 0)
    width = (_WIDTH - _GAP) // 2 if len(others) > 1 else _WIDTH
    small = replace(look, width=width, height=_HEIGHTS[1], has_key=False)
    main = draw(look, first).properties(title=_make_title(first))
    below = [draw(small, panel).properties(title=_make_title(panel)) for panel in others]
    chart = alt.vconcat(main, *([alt.hconcat(*below)] if below else []))
    return {**finish(chart, IN_PRINT, columns=4), "datasets": make_data(curve, 0)}


def _make_title(panel: Panel) -> dict[str, str]:
    """Return the title of a chart, below it what its marks are."""
    return {"text": panel.title, **({"subtitle": panel.note} if panel.note else {})}
