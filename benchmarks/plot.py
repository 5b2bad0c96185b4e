"""Draw the results of a run as an SVG, with nothing but the standard library.

`python benchmarks/plot.py build/benchmarks/results.json OUT.svg`; `run.py` does so at its end.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

WIDTH, MARGIN, LINE = 960, 24, 16
BAR_LEFT, BAR_WIDTH, BAR_HEIGHT = 250, 400, 13
"""Bars begin at `BAR_LEFT`; what is written beside the longest of them has the rest of the width."""
BLUE, ORANGE, GREY = "#2f6db5", "#d9661f", "#9a9a9a"
PHASE_COLOURS = ("#8fb8de", "#2f6db5", "#57a773", "#9bc53d", "#d9661f", "#b3b3b3", "#7d5ba6")
_PHASE_ORDER = ("read", "measure", "combine", "hash", "write")
_NUMBER = r"(\d[\d,]*(?:\.\d+)?)"
_MAX_SHARE = 3.0
"""Longest bar, as a multiple of the figure that was asked for; longer ones are cut."""


@dataclass(frozen=True)
class Bar:
    """A labelled bar, or what is stacked to one."""

    label: str
    parts: Sequence[tuple[float, str]]
    """Lengths with their colours, from left to right."""
    note: str
    gap: int = 0
    """Room below."""


@dataclass
class Panel:
    """Bars on one scale that begins at 0."""

    title: str
    subtitle: str
    bars: list[Bar]
    limit: float = 0.0
    """Value that a vertical line marks; 0 for no line."""
    legend: list[tuple[str, str]] = field(default_factory=list)
    """Names and their colours."""
    most: float = 0.0
    """The largest value drawn; that of the longest bar if 0."""

    def draw(self, top: float) -> tuple[list[str], float]:
        """Return the panel's elements and where the next one may begin."""
        lines = [_text(MARGIN, top + LINE, self.title, "title"), _text(MARGIN, top + 2.2 * LINE, self.subtitle, "note")]
        x, y = float(BAR_LEFT), top + 2.7 * LINE
        for name, colour in self.legend:
            lines += [_rect(x, y, 10, colour, 10), _text(x + 14, y + 9, name, "note")]
            x += 30 + 6.5 * len(name)
        y += LINE * bool(self.legend) + 6
        scale = BAR_WIDTH / (self.most or max(sum(length for length, _ in bar.parts) for bar in self.bars))
        limit = BAR_LEFT + self.limit * scale
        first = y
        for bar in self.bars:
            labels = _wrap(bar.label, 38)
            height = max(BAR_HEIGHT, 13 * len(labels)) + 6
            middle = y + height / 2 - 3
            for number, label in enumerate(labels):
                lines.append(_text(BAR_LEFT - 8, middle + 4 + 13 * (number - (len(labels) - 1) / 2), label, "label"))
            x = BAR_LEFT
            for length, colour in bar.parts:
                width = min(length * scale, BAR_LEFT + BAR_WIDTH - x)
                lines.append(_rect(x, middle - BAR_HEIGHT / 2, width, colour))
                x += width
            lines.append(_text(max(x, limit) + 6, middle + 4, bar.note, "note"))
            y += height + bar.gap
        if self.limit:
            lines.append(f'<line x1="{limit:.1f}" x2="{limit:.1f}" y1="{first - 4:.1f}" y2="{y:.1f}" class="limit"/>')
        return lines, y + 1.5 * LINE


def to_svg(results: dict[str, Any]) -> str:
    """Return the picture of a run's results: times, phases, and every figure against what was asked."""
    rows = [row for rows in results["benchmarks"].values() for row in rows]
    panels = [panel for panel in (_draw_times(rows), _draw_phases(rows), _draw_asked(rows)) if panel.bars]
    lines, y = [], float(MARGIN)
    for panel in panels:
        drawn, y = panel.draw(y)
        lines += drawn
    lines.append(_text(MARGIN, y, "; ".join(results["machine"].values()), "note"))
    style = (
        "text{font-family:sans-serif;font-size:12px;fill:#222}.title{font-size:15px;font-weight:bold}"
        ".note{font-size:11px;fill:#555}.label{text-anchor:end}.limit{stroke:#222;stroke-dasharray:4 3}"
    )
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y + MARGIN:.0f}">'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, f"<style>{style}</style>", ground, *lines, "</svg>\n"])


def read_share(asked: str, measured: str) -> float | None:
    """Return a figure as a share of what was asked: more than 1 is worse than that. None where it cannot be told.

    >>> read_share("at most 1 : 8", "1 : 4.0"), read_share("at most 1.4 : 1", "wall 0.7 : 1, CPU 2.8 : 1")
    (2.0, 2.0)
    >>> read_share("at least 90%", "45%"), read_share("at most 1.3 GiB", "0.65 GiB"), read_share("the same", "the same")
    (2.0, 0.5, None)
    """
    limits, values = _read_numbers(asked), _read_numbers(measured)
    if not limits or not values or not min(*values, *limits) or not asked.startswith(("at most", "at least")):
        return None
    if asked.startswith("at least"):
        return limits[0] / min(values)
    return max(values) / limits[0]


def _read_numbers(text: str) -> list[float]:
    """Return the ratios in a text, or else its first number."""
    ratios = re.findall(rf"{_NUMBER} : {_NUMBER}", text)
    if ratios:
        return [_to_float(left) / _to_float(right) for left, right in ratios if _to_float(right)]
    return [_to_float(number) for number in re.findall(_NUMBER, text)[:1]]


def _to_float(number: str) -> float:
    return float(number.replace(",", ""))


def _draw_times(rows: Sequence[dict[str, Any]]) -> Panel:
    bars = []
    for row in rows:
        runs = row["data"]
        if row["name"].startswith("whole-process wall") and runs.get("mergekit"):
            ours, theirs = (_median_wall(runs[who]) for who in ("raymerge", "mergekit"))
            name = row["name"].rpartition("mergekit, ")[2]
            bars.append(Bar(f"{name}, raymerge", [(ours, BLUE)], f"{ours:.1f} s"))
            note = f"{theirs:.1f} s, {theirs / ours:.1f} times as long"
            bars.append(Bar("mergekit", [(theirs, GREY)], note, gap=6))
    title = "Time of a merge: raymerge against mergekit 0.1.5"
    return Panel(title, "Seconds of the whole process, 0.5 B parameters in bfloat16, warm page cache; medians.", bars)


def _draw_phases(rows: Sequence[dict[str, Any]]) -> Panel:
    found = {row["name"].partition(", ")[2]: row["data"] for row in rows if row["name"].startswith("ns per element on")}
    names = list(dict.fromkeys(phase for phases in found.values() for phase in phases))
    order = sorted(names, key=lambda name: (_PHASE_ORDER.index(name.split()[0]), name))
    colours = dict(zip(order, PHASE_COLOURS, strict=False))
    bars = []
    for name, phases in found.items():
        parts = [(phases[phase], colours[phase]) for phase in order if phase in phases]
        bars.append(Bar(name, parts, f"{sum(phases.values()):.1f} ns"))
    subtitle = "Nanoseconds of processor time on one core for each element of the output, all of it in memory."
    return Panel("Where the time of a merge goes", subtitle, bars, legend=list(colours.items()))


def _draw_asked(rows: Sequence[dict[str, Any]]) -> Panel:
    bars = []
    for row in rows:
        share = read_share(row["asked"], row["measured"])
        if share is not None:
            colour = ORANGE if row["is_met"] is False else BLUE
            cut = " (cut)" if share > _MAX_SHARE else ""
            note = f"{row['measured']}; asked {row['asked'].partition(', ')[0]}{cut}"
            bars.append(Bar(row["name"], [(min(share, _MAX_SHARE), colour)], note))
    longest = max((bar.parts[0][0] for bar in bars), default=0.0)
    title = "Every figure against what was asked of it"
    subtitle = "As a share of the limit, which is the dashed line: shorter is better."
    legend = [("met", BLUE), ("missed", ORANGE)]
    return Panel(title, subtitle, bars, limit=1.0, legend=legend, most=max(1.5, longest))


def _median_wall(usages: Sequence[dict[str, float]]) -> float:
    return statistics.median(usage["wall"] for usage in usages)


def _wrap(text: str, width: int) -> list[str]:
    """Return lines of so many characters at most, but for longer words.

    >>> _wrap("peak memory, ties with 8 fine-tunes", 20)
    ['peak memory, ties', 'with 8 fine-tunes']
    """
    lines = [""]
    for word in text.split():
        if lines[-1] and len(lines[-1]) + 1 + len(word) > width:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    return lines


def _text(x: float, y: float, text: str, kind: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}">{escape(text)}</text>'


def _rect(x: float, y: float, width: float, colour: str, height: float = BAR_HEIGHT) -> str:
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" fill="{colour}"/>'


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    arguments.picture.write_text(to_svg(json.loads(arguments.results.read_text())))
