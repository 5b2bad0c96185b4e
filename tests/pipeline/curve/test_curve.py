"""`raymerge curve` and `raymerge.curve` on spectra as they are stored."""

from __future__ import annotations

import csv
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import raymerge
from raymerge.pipeline.checkpoint.manifest import MANIFEST
from raymerge.pipeline.curve.curve import make_curve
from raymerge.pipeline.curve.drawing.pictures import make_pictures
from raymerge.pipeline.curve.records import Records
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.table import make_csv
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.evaluation.digests import Digests
from raymerge.pipeline.evaluation.results import Estimate, Evaluation
from raymerge.pipeline.spectrum.record import Spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.commands import Cli
from tests.servers.s3 import S3Server
from tests.spectra import evaluate_all, fail, make_evaluation, make_spectrum, write_spectrum
from tests.stored_models import download, upload

STRENGTHS = [round(0.1 * step, 1) for step in range(1, 10)]
FILES = {"curve.html", "curve.png", "curve.svg", "curve.csv"}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A spectrum with a point that could not be made, an evaluation that failed, and a damaged one."""
    spectrum = make_spectrum({"t": STRENGTHS}, failed=["t-0.2"])
    found = [each for each in evaluate_all(spectrum, ["arithmetic", "gsm8k"]) if each.model != "t-0.2"]
    found = [fail(each, "out of memory") if (each.model, each.task) == ("t-0.9", "gsm8k") else each for each in found]
    write_spectrum(tmp_path / "spectrum", spectrum, found)
    (tmp_path / "spectrum/evaluations/t-0.1/text-0.json").write_text("{")
    (tmp_path / "spectrum/evaluations/t-0.1/text-0.jsonl").write_text("not an evaluation")
    return tmp_path / "spectrum"


def make(spectrum: Spectrum, evaluations: list[Evaluation]) -> Curve:
    return make_curve("spectrum", spectrum, Records(tuple(evaluations), ()), (), None)


def test_the_command_draws_tells_and_chooses(directory: Path, cli: Cli, tmp_path: Path) -> None:
    outcome = cli("curve", directory, "--within", "1.0", "--save-yaml", tmp_path / "best.yml")
    assert outcome.code == 0, outcome.err
    for said in (
        "Mean over 2 tasks",
        "t-0.7 is 2.0 points more accurate than thinking with 36% fewer tokens (4,311 instead of 6,763)",
        "Between t = 0.4 and 0.6 the share of answers that think rises from 5% to 95%",
        "t-0.2: could not be made: no such tensor",
        "t-0.9: incomplete, 1 of 2 tasks; gsm8k: failed: out of memory",
        "Choice: t-0.6",
        "settings: t = 0.6",
    ):
        assert said in outcome.out
    assert "spectrum/evaluations/t-0.1/text-0.json is damaged" in outcome.err
    assert yaml.safe_load((tmp_path / "best.yml").read_text())["parameters"] == {"t": 0.6}
    assert {file.name for file in directory.iterdir() if file.name.startswith("curve")} == FILES
    rows = list(csv.DictReader((directory / "curve.csv").read_text().splitlines()))
    assert len(rows) == 3 * 11
    (chosen,) = (row for row in rows if row["chosen"] and row["view"] == "gsm8k")
    assert (chosen["model"], chosen["t"], chosen["on_front"]) == ("t-0.6", "0.6", "yes")
    assert (directory / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert (directory / "curve.svg").read_text().startswith("<svg")


def test_the_files_are_the_same_each_time(directory: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        raymerge.curve(directory, out=tmp_path / name)
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_json_and_one_task(directory: Path, cli: Cli, tmp_path: Path) -> None:
    outcome = cli(
        "curve", directory, "--task", "gsm8k", "--best-under-tokens", "4500", "--json", "--out", tmp_path / "out"
    )
    found = json.loads(outcome.out)
    assert [view["title"] for view in found["views"]] == ["gsm8k"]
    assert (found["choice"]["model"], found["choice"]["settings"]) == ("t-0.7", {"t": 0.7})
    assert found["rule"] == {"name": "best_under_tokens", "limit": 4500.0}
    assert not (directory / "curve.html").exists()


def test_from_and_to_s3(directory: Path, bucket: str, s3_server: S3Server) -> None:
    url = upload(s3_server, bucket, "spectrum", directory)
    found = raymerge.curve(url)
    assert found.choice is not None
    assert found.choice.model == "t-0.6"
    assert download(url).keys() >= FILES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"within": -1.0}, "--within is -1; a number of percentage points from 0 is needed"),
        ({"within": float("nan")}, "--within is nan"),
        ({"best_under_tokens": 0.0}, "--best-under-tokens is 0; a number of tokens above 0 is needed"),
        ({"within": 1.0, "best_under_tokens": 10.0}, "--within and --best-under-tokens are two rules; choose one"),
        ({"task": ["gsm"]}, "no model was evaluated in the task 'gsm'; did you mean 'gsm8k'"),
    ],
)
def test_what_is_wrong_with_the_options_is_told(options: dict[str, object], said: str, directory: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        raymerge.curve(directory, **options)  # type: ignore[arg-type]


def test_a_model_that_was_made_anew_is_judged_by_its_new_evaluation(tmp_path: Path) -> None:
    spectrum = make_spectrum({"t": [0.1]})
    (tmp_path / "t-0.1").mkdir()
    (tmp_path / "t-0.1/config.json").write_text("{}")
    with open_stores() as stores:
        digest = Digests(stores, str(tmp_path)).measure(str(tmp_path / "t-0.1"))
    new = replace(make_evaluation("t-0.1", 0.25), digest=digest, url=str(tmp_path / "t-0.1"))
    old = replace(new, digest="former", accuracy=Estimate(0.75, 0.7, 0.8))
    write_spectrum(tmp_path, spectrum, [old, new])
    found = raymerge.curve(tmp_path)
    assert found.views[0].estimate("t-0.1").mean == 0.25
    assert found.warnings == ()


def test_where_an_evaluation_says_that_its_model_is_does_not_count(tmp_path: Path) -> None:
    spectrum = make_spectrum({"t": [0.1]})
    digests = {}
    for name in ("t-0.1", "elsewhere"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
        with open_stores() as stores:
            digests[name] = Digests(stores, str(tmp_path)).measure(str(tmp_path / name))
    url = str(tmp_path / "elsewhere")
    own = replace(make_evaluation("t-0.1", 0.25), digest=digests["t-0.1"], url=url)
    other = replace(own, digest=digests["elsewhere"], accuracy=Estimate(0.75, 0.7, 0.8))
    found = raymerge.curve(write_spectrum(tmp_path, spectrum, [other, own]))
    assert found.views[0].estimate("t-0.1").mean == 0.25


def test_a_model_that_was_made_anew_since_has_no_evaluation(tmp_path: Path) -> None:
    spectrum = make_spectrum({"t": [0.1, 0.2]})
    made = [replace(make_evaluation(f"t-0.{k}", 0.5), digest="former", url=str(tmp_path / f"t-0.{k}")) for k in (1, 2)]
    write_spectrum(tmp_path, spectrum, made)
    (tmp_path / "t-0.1").mkdir()
    for name in ("config.json", MANIFEST):
        (tmp_path / "t-0.1" / name).write_text("{}")
    later = next((tmp_path / "evaluations/t-0.1").iterdir()).stat().st_mtime + 1
    os.utime(tmp_path / "t-0.1" / MANIFEST, (later, later))
    found = raymerge.curve(tmp_path)
    assert list(found.views[0].scores) == ["t-0.2"]
    assert found.warnings == (
        "t-0.1 has been made anew since it was evaluated; `raymerge eval` evaluates what it is now",
    )


def test_an_evaluation_in_the_directory_of_another_model_does_not_count(tmp_path: Path) -> None:
    made = [make_evaluation("t-0.1", 0.5), make_evaluation("t-0.2", 0.5)]
    write_spectrum(tmp_path, make_spectrum({"t": [0.1, 0.2]}), made)
    path = next((tmp_path / "evaluations/t-0.2").iterdir())
    path.write_text(path.read_text().replace('"t-0.2"', '"../../t-0.1"'))
    found = raymerge.curve(tmp_path)
    assert list(found.views[0].scores) == ["t-0.1"]
    assert 'is damaged: it is of "../../t-0.1", in the directory of another model' in found.warnings[-1]


def test_evaluations_may_be_elsewhere(directory: Path, tmp_path: Path) -> None:
    (directory / "evaluations").rename(tmp_path / "results")
    found = raymerge.curve(directory, evaluations=tmp_path / "results", out=tmp_path)
    assert found.chosen is not None
    assert found.chosen.url == str(directory / "t-0.6")
    with pytest.raises(ConfigError, match="cannot be written to hf://me/spectrum; name another directory as `out`"):
        raymerge.curve("hf://me/spectrum")


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"has no spectrum\.json; `raymerge sweep"):
        raymerge.curve(tmp_path)
    write_spectrum(tmp_path, make_spectrum({"t": [0.1]}), [])
    with pytest.raises(OutputError, match="has no evaluations; `raymerge eval"):
        raymerge.curve(tmp_path)


def test_a_rule_needs_tokens(tmp_path: Path) -> None:
    spectrum = make_spectrum({"t": [0.1, 0.2]})
    write_spectrum(tmp_path, spectrum, [make_evaluation(point.name, 0.5) for point in spectrum.points])
    with pytest.raises(
        ConfigError, match="the rule `within` compares accuracy and tokens, and 'arithmetic' has no tokens"
    ):
        raymerge.curve(tmp_path, within=1)


@pytest.mark.parametrize(
    "evaluations",
    [
        pytest.param([make_evaluation("t-0.1", 0.5, 10, 0.5)], id="one point"),
        pytest.param([make_evaluation("thinking", 0.5, 10)], id="a parent alone"),
        pytest.param([make_evaluation("rival", 0.5, 10)], id="another model alone"),
        pytest.param([make_evaluation("t-0.1", 0.5)], id="no tokens"),
        pytest.param([make_evaluation("t-0.1", None, loss=2.5)], id="a loss"),
        pytest.param([make_evaluation("t-0.1", float("nan"), 10)], id="nothing finite"),
        pytest.param([fail(make_evaluation("t-0.1", 0.5), "died")], id="nothing complete"),
    ],
)
@pytest.mark.parametrize("grid", [{"t": [0.1, 0.2]}, {"t": ["0.1", "slow"]}], ids=["numbers", "words"])
def test_whatever_little_there_is_is_drawn(grid: dict[str, list[object]], evaluations: list[Evaluation]) -> None:
    curve = make(make_spectrum(grid), evaluations)
    svg, png = make_pictures(curve)
    assert svg.startswith("<svg")
    assert png.startswith(b"\x89PNG")
    assert (curve.choice is not None) == any(
        each.model == "t-0.1"
        and each.state == "complete"
        and each.accuracy != make_evaluation("", float("nan")).accuracy
        for each in evaluations
    ) or "nan" in repr(evaluations)


def test_names_are_no_formulas_in_a_spreadsheet() -> None:
    spectrum = make_spectrum({"=path": [-0.5, "=1+1"]})
    text = make_csv(make(spectrum, [make_evaluation("=HYPERLINK()", 0.5, 10)]))
    rows = list(csv.reader(text.splitlines()))
    assert "'=path" in rows[0]
    assert "-0.5" in rows[1]
    assert "'=1+1" in rows[2]
    assert rows[-1][1] == "'=HYPERLINK()"


def test_a_chosen_model_that_is_only_planned_is_told_with_what_makes_it(tmp_path: Path, cli: Cli) -> None:
    spectrum = make_spectrum({"t": [0.3]})
    planned = replace(spectrum, points=tuple(replace(point, state="planned") for point in spectrum.points))
    write_spectrum(tmp_path, planned, [make_evaluation("t-0.3", 0.5, 100)])
    outcome = cli("curve", tmp_path)
    assert "model:    not kept, only its YAML: give --save-yaml best.yml too" in outcome.out
    assert f"{tmp_path}/t-0.3" not in outcome.out
    assert "not kept, only its YAML" in (tmp_path / "curve.html").read_text()
    found = json.loads(cli("curve", tmp_path, "--json").out)
    assert found["choice"]["is_made"] is False
