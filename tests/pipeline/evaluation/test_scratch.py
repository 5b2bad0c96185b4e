"""Models that are brought here for an evaluation, and are gone after it."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.evaluation.events import Evaluated, EvaluationEvent
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.subjects import find_subjects
from raymerge.pipeline.stores.open import Stores
from tests.checkpoints import read_files
from tests.pipelines import write_pipeline
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

SCRIPT = """
import hashlib, json, pathlib, sys
model = pathlib.Path(sys.argv[1])
with open("calls.txt", "a") as calls:
    print(model, file=calls)
content = b"".join(path.read_bytes() for path in sorted(model.glob("*.safetensors")))
print(json.dumps({"sum": int(hashlib.sha256(content).hexdigest()[:8], 16), "files": len(list(model.iterdir()))}))
"""


LIST_SCRIPT = """
import json, pathlib, sys
model = pathlib.Path(sys.argv[1])
files = sorted(path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file())
pathlib.Path("files.json").write_text(json.dumps(files))
print(json.dumps({"files": len(files)}))
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for seed, name in enumerate(("a", "b")):
        write_tokenized(tmp_path / name, seed, byte_level(TEXTS[0]))
    (tmp_path / "sum.py").write_text(SCRIPT)
    (tmp_path / "scratch").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    return tmp_path


def evaluate(*models: str | Path, events: list[EvaluationEvent] | None = None) -> list[Evaluation]:
    told = [] if events is None else events
    return raymerge.evaluate(models, f"command:{sys.executable} -S -E sum.py {{model}}", on_event=told.append)


def read_calls() -> list[str]:
    return Path("calls.txt").read_text().splitlines()


def test_planned_points_are_merged_evaluated_and_deleted(place: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    sets = {"weight[1]": [0.5, 1.0, 2.0]}
    raymerge.sweep(recipe, "planned", sets, materialize="none")
    found = evaluate("planned")
    assert [each.state for each in found] == ["complete"] * 5
    assert not any((place / "scratch").iterdir())
    assert not list((place / "planned").glob("weight*"))
    raymerge.sweep(recipe, "made", sets)
    for one, other in zip(found, evaluate("made"), strict=True):
        assert (one.model, one.digest, one.other["sum"]) == (other.model, other.digest, other.other["sum"])
    num_calls = len(read_calls())
    events: list[EvaluationEvent] = []
    assert evaluate("planned", events=events) == found
    assert all(event.is_cached for event in events if isinstance(event, Evaluated))
    assert len(read_calls()) == num_calls


def test_what_a_killed_run_has_left_is_deleted(place: Path) -> None:
    for name in ("raymerge-killed", "raymerge-mine", "other"):
        (place / "scratch" / name / "model").mkdir(parents=True)
        (place / "scratch" / name / ("lock" if name != "raymerge-mine" else "notes")).touch()
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    raymerge.sweep(recipe, "planned", {"weight[1]": [0.5]}, materialize="none")
    evaluate("planned")
    assert sorted(path.name for path in (place / "scratch").iterdir()) == ["other", "raymerge-mine"]


def test_a_model_of_another_store_is_fetched_and_deleted(place: Path, stores: Stores) -> None:
    for name, content in {**read_files(place / "a"), "pytorch_model.bin": b"x", ".git/config": b"x"}.items():
        stores.at("memory://evaluated/a").write(f"memory://evaluated/a/{name}", content)
    remote, local = evaluate("memory://evaluated/a", place / "a")
    assert (remote.model, local.model) == ("a", "a-2")
    assert remote.state == "complete", remote.error
    assert remote.other["sum"] == local.other["sum"]
    assert remote.url == "memory://evaluated/a"
    assert not any((place / "scratch").iterdir())


def test_a_pipeline_of_another_store_is_fetched_with_its_components(place: Path, stores: Stores) -> None:
    write_pipeline(place / "pipe")
    (place / "pipe/unet/diffusion_pytorch_model.bin").write_bytes(b"a second copy")
    files = {
        path.relative_to(place / "pipe").as_posix(): path for path in (place / "pipe").rglob("*") if path.is_file()
    }
    for name, path in files.items():
        stores.at("memory://evaluated/pipe").write(f"memory://evaluated/pipe/{name}", path.read_bytes())
    Path("sum.py").write_text(LIST_SCRIPT)
    (found,) = evaluate("memory://evaluated/pipe")
    assert found.state == "complete", found.error
    assert json.loads(Path("files.json").read_text()) == sorted({*files} - {"unet/diffusion_pytorch_model.bin"})
    stores.at("memory://evaluated/pipe").write("memory://evaluated/pipe/scheduler/scheduler_config.json", b"{}")
    (other,) = evaluate("memory://evaluated/pipe")
    assert other.digest != found.digest


def test_a_point_that_cannot_be_made_is_marked(place: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    raymerge.sweep(recipe, "planned", {"weight[1]": [0.5, 1.0]}, materialize="none")
    for path in (place / "b").glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-40])
    first, second, parent, _ = evaluate("planned")
    assert [each.state for each in (first, second, parent)] == ["failed", "failed", "complete"]
    assert "CheckpointError" in first.error


def test_a_point_whose_inputs_have_changed_is_not_taken_for_the_one_evaluated_before(place: Path) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    raymerge.sweep(recipe, "planned", {"weight[1]": [0.5]}, materialize="none")
    before = evaluate("planned")[0]
    write_tokenized(place / "b", 7, byte_level(TEXTS[0]))
    assert evaluate("planned")[0] == before
    Path("sum.py").write_text(f"{SCRIPT}# another task")
    after = evaluate("planned")[0]
    assert (after.state, after.other) == ("failed", {})
    assert "its inputs have changed" in after.error


def test_a_model_that_was_evaluated_and_deleted_is_not_merged_again(place: Path, stores: Stores) -> None:
    recipe = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1}}
    raymerge.sweep(recipe, "made", {"weight[1]": [0.5]})
    before = evaluate("made")
    record = Path("made/spectrum.json")
    record.write_text(record.read_text().replace('"complete"', '"planned"'))
    assert find_subjects(stores, ["made"]).models[0].planned is None, "a sweep may be interrupted before it says so"
    shutil.rmtree("made/weight1-0.5")
    assert find_subjects(stores, ["made"]).models[0].planned is not None
    events: list[EvaluationEvent] = []
    assert [each.digest for each in evaluate("made", events=events)] == [each.digest for each in before]
    assert all(event.is_cached for event in events if isinstance(event, Evaluated))
