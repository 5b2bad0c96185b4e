"""The report that `raymerge curve` prints: text, and JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from dataclasses import asdict

from raymerge.pipeline.curve.formats import format_settings
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.sentences import describe_choice, describe_findings, describe_gaps
from raymerge.pipeline.curve.table import format_table
from raymerge.pipeline.messages import escaped

_WIDTH = 118
_NOT_KEPT = "not kept, only its YAML: give --save-yaml best.yml too, and `raymerge merge best.yml OUT` makes it"


def format_curve(curve: Curve) -> str:
    """Return the table of the first view, its findings, and the choice with its YAML."""
    return "\n\n".join(_list_parts(curve))


def curve_json(curve: Curve) -> str:
    """Return all of a curve as JSON."""
    value = asdict(curve)
    for view, each, found in zip(curve.views, value["views"], curve.findings, strict=True):
        each["sentences"] = [*describe_findings(view, found, curve.models), *describe_gaps(view)]
    if curve.choice is not None and curve.chosen is not None:
        value["choice"] |= {
            "url": curve.chosen.url,
            "is_made": curve.chosen.is_made,
            "settings": dict(curve.chosen.settings),
            "config": curve.chosen.config,
            "sentences": list(describe_choice(curve.views[0], curve.choice)),
        }
    return json.dumps(value, indent=2, ensure_ascii=False)


def _list_parts(curve: Curve) -> Iterator[str]:
    view = curve.views[0]
    yield format_table(curve)
    if sentences := describe_findings(view, curve.findings[0], curve.models):
        yield "\n".join(map(_wrap, sentences))
    if gaps := describe_gaps(view):
        yield "\n".join(["Not in the curve", *map(_wrap, gaps)])
    chosen = curve.chosen
    if curve.choice is None or chosen is None:
        yield "No choice: no point has all the figures that it takes."
        return
    lines = [
        f"{'Choice' if curve.choice.is_met else 'Nearest'}: {escaped(chosen.name)}",
        *(_wrap(sentence) for sentence in describe_choice(view, curve.choice)),
        f"  settings: {escaped(format_settings(chosen.settings))}",
        f"  model:    {escaped(chosen.url) if chosen.is_made else _NOT_KEPT}",
        "  YAML:",
        textwrap.indent(chosen.config.rstrip("\n"), "    "),
    ]
    yield "\n".join(lines)


def _wrap(sentence: str) -> str:
    return textwrap.fill(
        sentence,
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
    )
