"""Sweeps of small models: each is what its own merge gives."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
import yaml

import raymerge
from raymerge.pipeline.errors import ConfigError, OutputError, TensorMismatchError
from raymerge.pipeline.progress.events import Warned
from raymerge.pipeline.spectrum.record import RECORD, TABLE
from raymerge.pipeline.spectrum.report import format_sweep
from raymerge.pipeline.spectrum.sweep import plan_sweep, sweep
from raymerge.pipeline.spectrum.verify import verify_all
from tests.checkpoints import read_tensors, write_family
from tests.commands import Cli
from tests.pipeline.spectrum.samples import check_models, make_config, read_record
from tests.watchers import Keep

T = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, dtype=torch.bfloat16, vocab=400, hidden=32)


def test_a_range_makes_models_from_one_reading(family: tuple[Path, ...], tmp_path: Path) -> None:
    watch = Keep()
    report = raymerge.sweep(make_config("slerp", family), tmp_path / "s", ["t=0.1:0.9:0.1"], on_event=watch)
    names = [f"t-{t}" for t in T]
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [RECORD, TABLE, *names]
    assert [point.name for point in report.spectrum.points] == names
    stored = sum((model / "model.safetensors").stat().st_size for model in family[:2])
    planned = watch.list(raymerge.SweepPlanned)[0]
    assert (planned.num_points, planned.num_models, planned.num_batches) == (9, 9, 1)
    assert 0.9 * stored < planned.read_nbytes < stored, "once for all, without headers"
    assert sum(result.read_nbytes for result in watch.list(raymerge.ShardResult)) == planned.read_nbytes
    done = watch.list(raymerge.SweepDone)[0]
    assert (done.num_points, done.num_complete, done.num_made) == (9, 9, 9)
    spectrum = read_record(tmp_path / "s")
    assert spectrum == report.spectrum
    assert [(parent.name, parent.is_base) for parent in spectrum.parents] == [("base", True), ("tuned1", False)]
    assert [point.settings for point in spectrum.points] == [{"t": t} for t in T]
    table = pq.read_table(tmp_path / "s" / TABLE)
    assert table["t"].to_pylist() == T
    assert table["name"].to_pylist() == names
    check_models(tmp_path / "s", tmp_path / "alone")


def test_a_grid_of_two_paths(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("linear", family, parameters={"weight": 1})
    raymerge.sweep(config, tmp_path / "s", {"weight[0]": [0.5, 1], "weight[1]": "0:1:0.5"}, workers=1)
    names = [f"weight0-{a}_weight1-{b}" for a in ("0.5", "1") for b in ("0", "0.5", "1")]
    assert [point.name for point in read_record(tmp_path / "s").points] == names
    check_models(tmp_path / "s", tmp_path / "alone")


def test_the_section_of_a_config(family: tuple[Path, ...], tmp_path: Path) -> None:
    text = yaml.safe_dump(make_config("ties", family, parameters={"weight": 1}))
    config = tmp_path / "sweep.yml"
    config.write_text(
        text
        + """
sweep:
  grid:
    density: 0.4:0.8:0.4
  zip:
    weight[0]: [0.2, 0.8]
    weight[1]: [0.8, 0.2]
  points:
    all: {density: 1, normalize: false}
    ramp: {weight: [0, 1], density: 0.5}
"""
    )
    raymerge.sweep(config, tmp_path / "s", workers=1)
    names = [point.name for point in read_record(tmp_path / "s").points]
    assert names == [
        "density-0.4_weight0-0.2_weight1-0.8",
        "density-0.4_weight0-0.8_weight1-0.2",
        "density-0.8_weight0-0.2_weight1-0.8",
        "density-0.8_weight0-0.8_weight1-0.2",
        "all",
        "ramp",
    ]
    check_models(tmp_path / "s", tmp_path / "alone")
    with pytest.raises(
        ConfigError, match=r"sweep.yml:\d+: sweep: this config describes many models; .* with --dry-run plans"
    ):
        raymerge.merge(config, tmp_path / "one")


def test_methods_and_seeds_are_swept(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("ties", family, parameters={"weight": 1, "density": 0.5})
    sets = ["merge_method=dare_ties,ties", "seed=1,2"]
    raymerge.sweep(config, tmp_path / "s", sets, workers=1)
    points = {point.name: point for point in read_record(tmp_path / "s").points}
    assert points["dare_ties_seed-1"].fingerprint != points["dare_ties_seed-2"].fingerprint
    assert len(points) == 4
    check_models(tmp_path / "s", tmp_path / "alone")


def test_seeds_that_make_no_difference_are_warned_of(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("ties", family, parameters={"weight": 1, "density": 0.5})
    told: list[str] = []

    def note(event: object) -> None:
        told.extend([event.text] if isinstance(event, Warned) else [])

    raymerge.sweep(config, tmp_path / "s", ["seed=1,2"], workers=1, on_event=note)
    assert told == [
        "seed: no random numbers are drawn here by ties; seed-1, seed-2 get equal bytes. Leave the seed out"
    ]
    first, second = (read_tensors(tmp_path / "s" / name) for name in ("seed-1", "seed-2"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(ConfigError, match=r"refused because of strict: seed: no random numbers"):
        plan_sweep(config, tmp_path / "t", ["seed=1,2"], strict=True)
    for sets, num_warnings in ((["seed=1,2", "merge_method=dare_ties,della"], 0), (["density=1", "seed=1,2"], 1)):
        dare = {**config, "merge_method": "dare_ties"}
        assert len(plan_sweep(dare, tmp_path / "t", sets).seed_warnings) == num_warnings


def test_equal_points_are_one_model(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family, sweep={"grid": {"t": [0.5, 1]}, "points": {"half": {"t[*]": 0.5}}})
    raymerge.sweep(config, tmp_path / "s")
    points = {point.name: point for point in read_record(tmp_path / "s").points}
    assert points["half"].url == "t-0.5"
    assert points["half"].fingerprint == points["t-0.5"].fingerprint
    assert not (tmp_path / "s" / "half").exists()


def test_points_are_added_to_a_spectrum(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family)
    raymerge.sweep(config, tmp_path / "s", ["t=0.2,0.4"])
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "s").glob("t-*/*")}
    report = raymerge.sweep(config, tmp_path / "s", ["t=0.3:0.4:0.1"])
    assert [each.was_complete for each in report.reports] == [False, True]
    assert [point.name for point in report.spectrum.points] == ["t-0.2", "t-0.4", "t-0.3"]
    assert {path: path.stat().st_mtime_ns for path in before} == before
    with pytest.raises(OutputError, match=r"another recipe: dtype is nothing there, \"float16\" here"):
        raymerge.sweep({**config, "dtype": "float16"}, tmp_path / "s", ["t=0.3"])
    with pytest.raises(OutputError, match=r"has t-0\.3 already, made with another seed, shard size"):
        raymerge.sweep(config, tmp_path / "s", ["t=0.3"], shard_size="20kB")
    raymerge.sweep({**config, "dtype": "float16"}, tmp_path / "s", ["t=0.3"], overwrite=True)
    assert [point.name for point in read_record(tmp_path / "s").points] == ["t-0.3"]


def test_nothing_is_made_of_what_cannot_all_be_made(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family)
    with pytest.raises(ConfigError, match=r"1 of 3 points cannot be made:\nt-high \(t \"high\"\): parameters.t: "):
        raymerge.sweep(config, tmp_path / "s", ["t=0.1,high,0.5"])
    lone = write_family(tmp_path / "other", 1, num_layers=1, vocab=400, hidden=32)[1]
    other = make_config("linear", family, parameters={"weight": 1})
    with pytest.raises(TensorMismatchError, match=r"1 of 2 points cannot be made:\nmodel1-tuned1: "):
        raymerge.sweep(other, tmp_path / "s", {"models[1].model": [str(family[2]), str(lone)]})
    assert not (tmp_path / "s").exists()


def test_sweeps_that_wait_for_each_other_end(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family)
    with ThreadPoolExecutor() as pool:
        sets = ["t=0.2,0.4,0.6"], ["t=0.6,0.4,0.2"]
        runs = [pool.submit(raymerge.sweep, config, tmp_path / "s", each, wait=True, workers=1) for each in sets]
        reports = [run.result(60) for run in runs]
    assert sum(not each.was_complete for report in reports for each in report.reports) == 3, "each was made once"
    check_models(tmp_path / "s", tmp_path / "alone")


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["t"], "--set t: write PATH=VALUES"),
        (["t=0.1,0.1"], "--set t: 0.1 is given twice"),
        (["t=1,1.0"], "--set t: 1.0 is given twice"),
        (["t=0.1", "parameters.t=0.2"], "--set parameters.t: the same place as --set t"),
        (["tt=1"], "tt: the config has no 'tt'; did you mean 't'"),
        (["t=0:1:0.001", "normalize=true,false"], "the sweep has 2,002 points|1,001 values"),
        (["t=0:1:0.01", "seed=0:20:1"], "the sweep has 2,121 points; at most 1,000"),
        (["seed=1.5"], "a seed is a whole number"),
        ([], "nothing is varied; give --set PATH=VALUES"),
    ],
)
def test_a_sweep_that_cannot_be_meant_is_refused(
    sets: list[str], said: str, family: tuple[Path, ...], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=said):
        plan_sweep(make_config("slerp", family), tmp_path / "s", sets)


@pytest.mark.parametrize(
    ("wrong", "line", "said"),
    [
        ("grid: {t: 0:1}", 5, "sweep.grid.t"),
        ("points:\n    half: {t: 0.5}\n    odd: {warmth: 1}", 7, "warmth: the config has no 'warmth'; slerp takes t"),
        ("points:\n    half: {t: 0.5}\n    'o d': {t: 1}", 7, "'o d' cannot name a model"),
        ("points:\n    half: {t: 0.5}\n    odd:\n      t: high", 7, r"odd \(t \"high\"\): parameters.t: "),
        ("points:\n    half: {t: 0.5}\n    odd:\n      t t: 1", 8, "'t t' is no path"),
        ("grid: {t: [0.5]}\n  points: {half: {t: 0.5}}", 4, "half sets the same as t-0.5"),
    ],
)
def test_mistakes_in_a_section_have_their_lines(
    wrong: str, line: int, said: str, family: tuple[Path, ...], tmp_path: Path
) -> None:
    config = tmp_path / "merge.yml"
    models = f"models: [{{model: {family[0]}}}, {{model: {family[1]}}}]"
    config.write_text(f"merge_method: slerp\nbase_model: {family[0]}\n{models}\nsweep:\n  {wrong}\n")
    with pytest.raises(ConfigError, match=rf"merge.yml:{line}: .*{said}"):
        plan_sweep(config, tmp_path / "s")


def test_planned_points_are_not_made(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family)
    report = sweep(config, tmp_path / "s", ["t=0.2,0.4"], materialize="none")
    assert [point.state for point in report.spectrum.points] == ["planned"] * 2
    assert sorted(path.name for path in (tmp_path / "s").iterdir()) == [RECORD, TABLE]
    with pytest.raises(OutputError, match="none of 2 points is complete; there is no model to check"):
        list(verify_all(str(tmp_path / "s")))
    raymerge.sweep(config, tmp_path / "s", ["t=0.2,0.4"])
    check_models(tmp_path / "s", tmp_path / "alone")


def test_the_command(family: tuple[Path, ...], tmp_path: Path, cli: Cli) -> None:
    config = tmp_path / "merge.yml"
    config.write_text(yaml.safe_dump(make_config("slerp", family)))
    out = tmp_path / "s"
    planned = cli("sweep", config, out, "--set", "t=0.2:0.8:0.3", "--dry-run")
    assert planned.code == 0
    assert "3 points" in planned.out
    once = re.search("read +(.+): the inputs once", planned.out)
    assert once
    assert not out.exists()
    for more in (["--dry-run"], []):
        planned = cli("sweep", config, out, "--set", "t=0.2:0.8:0.3", "--materialize", "none", *more)
        assert "models   none are made now" in planned.out + planned.err
        assert f"reads up to {once[1]} for it" in planned.out + planned.err
        assert "write " not in planned.out + planned.err
    assert f"{out}: 3 points planned, no models made" in planned.out
    done = cli("sweep", config, out, "--set", "t=0.2:0.8:0.3")
    assert done.code == 0
    assert f"{out}: 3 of 3 points complete, 3 made now" in done.out
    assert f"{out}/t-0.5: " in done.err
    assert cli("verify", out / "t-0.5").code == 0
    assert cli("verify", out).out.count(" is sound: ") == 3
    (out / "t-0.5" / "config.json").write_text("{}")
    (out / "t-0.8" / "model.safetensors").unlink()
    found = cli("verify", out)
    assert (found.code, found.out.count(" is sound: ")) == (2, 1)
    assert f"2 of 3 models of {out} cannot be used" in found.err
    assert "t-0.8 is not what was written:\n  model.safetensors: missing" in found.err
    assert cli("sweep", config, out / "t-0.5", "--set", "t=0.2").err.startswith(f"Error: {out}/t-0.5 holds a model")


def test_values_of_a_filter_that_matches_nothing_are_refused(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family, parameters={"t": 0.5})
    with pytest.raises(ConfigError, match=r"t\[nothing\]: all its values give one model; .* matches no tensor"):
        plan_sweep(config, tmp_path / "s", ["t[nothing]=0.1,0.5"])


def test_a_plan_names_what_a_point_is_equal_to(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("slerp", family, parameters={"t": 0.5})
    sweep(config, tmp_path / "s", ["t[nothing]=0.1"], materialize="none")
    said = format_sweep(plan_sweep(config, tmp_path / "s", ["t=0.2,0.5"]))
    assert "t-0.5 is the same model as t.nothing-0.1" in said
