"""Records that are read elsewhere than where the sweep ran."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
import yaml

import raymerge
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.evaluation.subjects import find_subjects
from raymerge.pipeline.spectrum.materialise import materialised
from raymerge.pipeline.spectrum.places import locate_path, locate_ref, note_places
from raymerge.pipeline.spectrum.record import Spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.checkpoints import read_files, write_family
from tests.pipeline.spectrum.samples import read_record

CONFIG = {
    "merge_method": "slerp",
    "base_model": "models/base",
    "models": [{"model": "models/base"}, {"model": "./models/tuned1"}],
}


@pytest.fixture
def swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write models and a planned spectrum of them, by relative paths; return the directory that has both."""
    work = tmp_path / "work"
    write_family(work / "models", 1, num_layers=1, dtype=torch.bfloat16)
    monkeypatch.chdir(work)
    raymerge.sweep(CONFIG, "s", ["t=0.2,0.4"], materialize="none")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return work


def test_paths_mean_the_same_from_anywhere(swept: Path) -> None:
    record = read_record(swept / "s")
    assert (record.started_in, record.place) == (str(swept), str(swept / "s"))
    assert [parent.model for parent in record.parents] == ["models/base", "./models/tuned1"], "as the recipe has them"
    assert locate_path(record, record.place, "./models/tuned1") == str(swept / "models/tuned1")
    for path in ("org/name", "s3://bucket/a", "/no/such/place", "hf://org/name"):
        assert locate_path(record, record.place, path) == path
    (swept / "models/base").rename(swept / "gone")
    assert locate_path(record, record.place, "models/base") == str(swept / "models/base"), "and no repository"
    (swept / "gone").rename(swept / "models/base")
    whole = locate_ref(record, record.place, ModelRef("models/base", None, ModelRef("models/tuned1")))
    assert str(whole) == f"{swept}/models/base+{swept}/models/tuned1"


def test_planned_points_are_made_from_anywhere(swept: Path, tmp_path: Path) -> None:
    record = read_record(swept / "s")
    raymerge.merge(
        yaml.safe_load(record.points[1].config.replace("models/", f"{swept}/models/").replace("./", "")), "alone"
    )
    with materialised(record.place, record, record.points[1]) as place:
        made, alone = read_files(Path(place)), read_files(Path("alone"))
    assert made["model.safetensors"] == alone["model.safetensors"]
    shutil.move(swept, tmp_path / "moved")
    with materialised(str(tmp_path / "moved/s"), record, record.points[1]) as place:
        assert read_files(Path(place))["model.safetensors"] == alone["model.safetensors"]


def test_runs_and_templates_are_found_from_anywhere(swept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = {"merge_method": "linear", "models": {"glob": "models/*"}, "chat_template": "mine.jinja"}
    (swept / "mine.jinja").write_text("{{ messages }}")
    monkeypatch.chdir(swept)
    report = raymerge.sweep(run, "run", ["dtype=bfloat16"], materialize="none")
    monkeypatch.chdir(swept / "s")
    with materialised(report.out, report.spectrum, report.spectrum.points[0]) as place:
        assert read_files(Path(place))["chat_template.jinja"] == b"{{ messages }}"


def test_what_lies_beside_a_spectrum_is_found_after_both_have_moved(swept: Path, tmp_path: Path) -> None:
    record = read_record(swept / "s")
    moved = tmp_path / "moved"
    shutil.copytree(swept, moved)
    assert locate_path(record, str(moved / "s"), "models/base") == str(swept / "models/base"), "what was swept"
    shutil.rmtree(swept)
    assert locate_path(record, str(moved / "s"), "models/base") == str(moved / "models/base")
    assert locate_path(record, str(moved / "s"), f"{swept}/models/base") == str(moved / "models/base")


def test_a_parent_that_was_left_behind_is_told_with_both_places(swept: Path, tmp_path: Path) -> None:
    moved = tmp_path / "moved"
    shutil.copytree(swept / "s", moved / "s")
    shutil.rmtree(swept)
    with open_stores() as stores:
        subjects = find_subjects(stores, [str(moved / "s")], only=["base", "t-0.2"])
    [error] = [each.error for each in subjects.models if each.is_parent]
    assert error.startswith(f"{swept}/models/base: no such directory;")
    assert error.endswith(f"and {moved}/models/base is not there either: move the parents along with it")


def test_a_sweep_from_another_directory_does_not_mix_models(
    swept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_family(tmp_path / "elsewhere" / "models", 1, num_layers=1, dtype=torch.bfloat16)
    with pytest.raises(OutputError, match=r"models/base was .*work/models/base there, and is .*elsewhere"):
        raymerge.sweep(CONFIG, swept / "s", ["t=0.9"], materialize="none")
    monkeypatch.chdir(swept)
    raymerge.sweep(CONFIG, swept / "s", ["t=0.9"], materialize="none")
    assert len(read_record(swept / "s").points) == 3


def test_a_record_without_places_is_read_as_before(swept: Path) -> None:
    record = read_record(swept / "s")
    old = Spectrum(record.raymerge, record.config, record.paths, record.parents, record.points)
    assert locate_path(old, record.place, "models/base") == "models/base"


def test_places_of_a_machine_are_noted_only_where_paths_need_them() -> None:
    made = Spectrum("1", "", (), (), ())
    assert note_places(made, "/s", [ModelRef("org/name"), ModelRef("s3://b/a")]) == made
    assert note_places(made, "hf://me/s", [ModelRef("./a")]) == made
    noted = note_places(made, "s3://b/s", [ModelRef("org/name", None, ModelRef("./a"))])
    assert (noted.started_in, noted.place, noted.local) == (str(Path.cwd()), "s3://b/s", ("./a",))
