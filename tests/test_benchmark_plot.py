"""The picture of a benchmark run: bars as long as their figures, and everything inside of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

PLOT = Path(__file__).parent.parent / "benchmarks" / "plot.py"
SVG = "{http://www.w3.org/2000/svg}"


def make_row(name: str, asked: str, measured: str, *, is_met: bool, **data: Any) -> dict[str, Any]:
    return {"name": name, "asked": asked, "measured": measured, "is_met": is_met, "how": "", "data": data}


def test_bars_are_as_long_as_what_they_stand_for(tmp_path: Path) -> None:
    times = {"raymerge": [{"wall": 2.0}], "mergekit": [{"wall": 8.0}]}
    phases = {"write": 1.0, "read": 1.0, "combine": 2.0}
    rows = [
        make_row("whole-process wall, raymerge : mergekit, a & b", "at most 1 : 8", "1 : 4.0", is_met=False, **times),
        make_row("ns per element on one core, linear, 2 sources", "", "2.00 of 4.00", is_met=True, **phases),
        make_row("peak memory", "at most 2 GiB", "1.00 GiB", is_met=True),
        make_row("bytes", "identical", "identical", is_met=True),
    ]
    results = tmp_path / "results.json"
    results.write_text(json.dumps({"machine": {"cores": "2 cores"}, "benchmarks": {"all": rows}}))
    subprocess.run([sys.executable, PLOT, results, tmp_path / "results.svg"], check=True)
    picture = ElementTree.parse(tmp_path / "results.svg").getroot()
    bars = [rect for rect in picture.iter(f"{SVG}rect") if rect.get("height") == "13"]
    widths = [float(bar.get("width", 0)) for bar in bars]
    assert widths == [100, 400, 100, 200, 100, 400, 100]
    line = picture.find(f"{SVG}line")
    assert line is not None
    assert float(line.get("x1", 0)) - float(bars[-1].get("x", 0)) == 200
    texts = [(float(text.get("x", 0)), float(text.get("y", 0)), text.text) for text in picture.iter(f"{SVG}text")]
    assert all(y < float(picture.get("height", 0)) for _, y, _ in texts)
    assert "a & b, raymerge" in [text for _, _, text in texts]
