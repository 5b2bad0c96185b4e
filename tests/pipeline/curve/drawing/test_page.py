"""The page as its reader gets it: parsed, and opened in a browser where there is one."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from raymerge.pipeline.curve.curve import make_curve
from raymerge.pipeline.curve.drawing.page import make_page
from raymerge.pipeline.curve.drawing.panels import list_panels
from raymerge.pipeline.curve.drawing.pictures import make_picture
from raymerge.pipeline.curve.records import Records
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.spectrum.record import Spectrum
from tests.spectra import evaluate_all, fail, make_evaluation, make_spectrum

STRENGTHS = [round(0.1 * step, 1) for step in range(1, 10)]
EVIL = "</script><script>window.broken = 1</script><img src=x onerror=alert(1)>{{ 7 * 7 }}&amp;"


class Parser(HTMLParser):
    """Lists the elements of a page, and the text of each."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.elements[-1][0] if self.elements else "", data))


def make(spectrum: Spectrum, evaluations: list[Evaluation]) -> Curve:
    return make_curve(
        "/models/spectrum", spectrum, Records(tuple(evaluations), ("evaluations/a is damaged",)), (), None
    )


def parse(page: str) -> tuple[Parser, Any]:
    parser = Parser()
    parser.feed(page)
    (data,) = (text for tag, text in parser.texts if tag == "script" and text.startswith('{"config"'))
    return parser, json.loads(data)


def test_the_page_has_the_charts_and_tables_of_each_task() -> None:
    spectrum = make_spectrum({"t": STRENGTHS}, failed=["t-0.2"])
    evaluations = [each for each in evaluate_all(spectrum, ["arithmetic", "gsm8k"]) if each.model != "t-0.2"]
    parser, data = parse(make_page(make(spectrum, evaluations)))
    assert [tag for tag, _ in parser.elements].count("table") == 3
    assert [len(data["charts"][view["charts"]]) for view in data["views"]] == [3, 3, 3]
    assert [len(view["data"]["models"]) for view in data["views"]] == [10, 10, 10]
    names = [values["data-name"] for tag, values in parser.elements if tag == "tr" and "data-name" in values]
    assert names == 3 * [*(f"t-{t}" for t in STRENGTHS if t != 0.2), "instruct", "thinking"]
    text = " ".join(text for _, text in parser.texts)
    assert "t-0.2: could not be made: no such tensor" in text
    assert "evaluations/a is damaged" in text
    assert "Choice: t-0.6" in text


def test_axes_stay_within_what_can_be_and_marks_are_explained() -> None:
    spectrum = make_spectrum({"t": STRENGTHS})
    evaluations = [make_evaluation(each.name, 1 - each.settings["t"], 1, half=0) for each in spectrum.points]  # type: ignore[operator]
    curve = make(spectrum, [*evaluations, make_evaluation("thinking", 1.0, 30, half=0)])
    for panel in list_panels(curve, 0):
        assert dict(panel.domains)["mean"] == pytest.approx((4.6, 100))
        assert dict(panel.domains)["tokens"] == pytest.approx((0, 31.74))
    spectrum = make_spectrum({"t": STRENGTHS})
    picture = json.dumps(make_picture(make(spectrum, evaluate_all(spectrum))))
    assert "Bars are 95% intervals; grey steps are the Pareto front; the ring is the choice." in picture
    assert picture.count("In the yellow band the share of answers that think jumps.") == 2


def test_text_from_outside_is_text() -> None:
    spectrum = make_spectrum({EVIL: STRENGTHS})
    point = replace(spectrum.points[0], name=EVIL, config=EVIL, url=EVIL)
    spectrum = replace(spectrum, points=(point, *spectrum.points[1:]))
    bad = fail(make_evaluation("thinking", 0.5, task=EVIL), EVIL)
    evaluations = [make_evaluation(each.name, 0.5, 50, 0.5, task=EVIL) for each in spectrum.points]
    page = make_page(make(spectrum, [*evaluations, bad]))
    parser, data = parse(page)
    tags = [tag for tag, _ in parser.elements]
    assert tags.count("script") == 3
    assert "img" not in tags
    assert not [values for _, values in parser.elements if any(name.startswith("on") for name in values)]
    assert EVIL in " ".join(text for tag, text in parser.texts if tag == "pre")
    assert data["views"][0]["data"]["models"][0]["name"] == EVIL


def test_the_page_loads_nothing() -> None:
    spectrum = make_spectrum({"t": STRENGTHS})
    parser, _ = parse(make_page(make(spectrum, evaluate_all(spectrum))))
    assert not [values for _, values in parser.elements if "src" in values or "href" in values]
    (policy,) = (values["content"] or "" for _, values in parser.elements if "http-equiv" in values)
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-")
    assert "unsafe-eval" not in policy


def test_a_page_of_losses_shows_them_against_the_parameter() -> None:
    spectrum = make_spectrum({"t": STRENGTHS})
    evaluations = [
        make_evaluation(each.name, None, loss=2 + (0.4 - STRENGTHS[index]) ** 2)
        for index, each in enumerate(spectrum.points)
    ]
    curve = make(spectrum, evaluations)
    parser, data = parse(make_page(curve))
    ((chart,),) = data["charts"]
    assert [text for tag, text in parser.texts if tag == "button" and text.strip()] == [
        "Model",
        "t",
        "Loss",
        "95% interval",
    ]
    assert '"title":"Loss (nats)"' in json.dumps(chart, separators=(",", ":"))
    assert curve.choice is not None
    assert curve.choice.model == "t-0.4"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_the_page_under_its_policy(tmp_path: Path) -> None:
    spectrum = make_spectrum({"t": STRENGTHS, "density": [0.2, 0.8]})
    file = tmp_path / "curve.html"
    file.write_text(
        make_page(make(spectrum, [*evaluate_all(spectrum, ["a", "b"]), make_evaluation("rival", 0.5, 900, task="a")]))
    )
    command = [
        *("chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"),
        *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--enable-logging=stderr"),
        *("--virtual-time-budget=10000", f"--user-data-dir={tmp_path / 'profile'}", f"file://{file}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert not re.findall("CONSOLE.*", done.stderr)
    assert len(re.findall('<svg[^>]* class="marks"', done.stdout)) == 3, "the charts of the first view"
    drawn = re.findall(r'<path aria-label="(t-[^"]*)" role="graphics-symbol"', done.stdout)
    assert len(drawn) == 3 * len(spectrum.points)
    assert re.match(r"t-0.1_density-0.2: \d+\.\d% \(.*\) at [\d,]+ tokens", drawn[0])
