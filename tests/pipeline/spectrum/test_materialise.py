"""Models of points that were only planned."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import raymerge
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.progress.events import Planned
from raymerge.pipeline.spectrum.materialise import materialised
from raymerge.pipeline.spectrum.sweep import sweep
from tests.checkpoints import read_files, write_family
from tests.documents import ROOT
from tests.pipeline.spectrum.samples import make_config
from tests.watchers import Keep


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("family"), 2, num_layers=1, dtype=torch.bfloat16)


def write_models(tmp_path: Path) -> tuple[Path, ...]:
    return write_family(tmp_path / "models", 2, num_layers=1, dtype=torch.bfloat16)


def test_a_planned_point_is_made_when_it_is_needed(family: tuple[Path, ...], tmp_path: Path) -> None:
    config = make_config("dare_ties", family, parameters={"weight": 1, "density": 0.5})
    report = sweep(config, tmp_path / "s", ["seed=1,2"], materialize="none")
    first, second = report.spectrum.points
    with materialised(report.out, report.spectrum, second, scratch=tmp_path / "scratch") as place:
        raymerge.merge(second.config, tmp_path / "alone", seed=2)
        assert read_files(Path(place)) == read_files(tmp_path / "alone")
    assert list((tmp_path / "scratch").iterdir()) == []
    with materialised(report.out, report.spectrum, first, scratch=tmp_path / "scratch") as place:
        assert read_files(Path(place)) != read_files(tmp_path / "alone")
    done = raymerge.sweep(config, tmp_path / "s", ["seed=1,2"])
    with materialised(done.out, done.spectrum, done.spectrum.points[0]) as place:
        assert place == str(tmp_path / "s" / "seed-1")
    assert (tmp_path / "s" / "seed-1" / "config.json").exists()


def test_planned_points_get_the_shards_of_the_sweep_and_stay_what_they_were(tmp_path: Path) -> None:
    report = raymerge.sweep(
        make_config("slerp", write_models(tmp_path)), tmp_path / "s", ["t=0.2"], materialize="none", shard_size="4kB"
    )
    with materialised(report.out, report.spectrum, report.spectrum.points[0]) as place:
        assert len(list(Path(place).glob("*.safetensors"))) > 1
    models = tmp_path / "models"
    (models / "tuned1/model.safetensors").write_bytes((models / "base/model.safetensors").read_bytes())
    made = materialised(report.out, report.spectrum, report.spectrum.points[0])
    with pytest.raises(OutputError, match=r"t-0\.2 comes out otherwise than planned: its inputs have changed"):
        made.__enter__()


def test_methods_of_the_users_own_are_asked_for(tmp_path: Path) -> None:
    ops = ROOT / "tests/seams/clipped.py"
    config = make_config("clipped", write_models(tmp_path)[:2])
    report = raymerge.sweep(config, tmp_path / "s", ["limit=0.5"], materialize="none", ops=str(ops))
    point = report.spectrum.points[0]
    assert point.ops == hashlib.sha256(ops.read_bytes()).hexdigest()
    with pytest.raises(ConfigError, match=r"planned with a file of merge methods .*, and none is given; .* as --ops"):
        materialised(report.out, report.spectrum, point).__enter__()
    with materialised(report.out, report.spectrum, point, MergeOptions(ops=str(ops))) as place:
        assert (Path(place) / "model.safetensors").exists()


def test_a_point_that_failed_says_why(family: tuple[Path, ...], tmp_path: Path) -> None:
    report = sweep(make_config("slerp", family), tmp_path / "s", ["t=0.2"], materialize="none")
    failed = replace(report.spectrum.points[0], state="failed", error="no such tensor")
    with pytest.raises(OutputError, match=r"^t-0\.2 cannot be made: no such tensor$"):
        materialised(report.out, report.spectrum, failed).__enter__()


def test_a_model_is_deleted_when_its_use_fails_and_its_merge_is_told(family: tuple[Path, ...], tmp_path: Path) -> None:
    report = sweep(make_config("slerp", family), tmp_path / "s", ["t=0.2"], materialize="none")
    (point,) = report.spectrum.points
    watch = Keep()
    made = materialised(report.out, report.spectrum, point, scratch=tmp_path / "scratch", on_event=watch)
    place = Path(made.__enter__())
    assert (place / "config.json").exists()
    assert not made.__exit__(RuntimeError, RuntimeError("broken off"), None)
    assert not place.exists()
    assert [event.fingerprint for event in watch.events if isinstance(event, Planned)] == [point.fingerprint]
