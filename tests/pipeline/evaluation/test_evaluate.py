"""Evaluations from models and a task to files; the models and the processes are real."""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.evaluation.events import Begun, Evaluated, EvaluationEvent, Sampled
from raymerge.pipeline.evaluation.results import Evaluation, parse_evaluation
from raymerge.pipeline.evaluation.subjects import Subject, _make_unique
from raymerge.pipeline.spectrum.record import Parent, Point, Spectrum
from raymerge.pipeline.stores.open import open_stores
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TASK = """
items:
  - {prompt: the quick, answer: 1}
  - {prompt: lazy dog, answer: 2}
  - {prompt: "7", answer: 7}
temperature: 1.0
max_new_tokens: 6
samples: 4
"""


@dataclass(frozen=True)
class Finished:
    root: Path
    spectrum: Path
    found: list[Evaluation]
    events: list[EvaluationEvent]


def write_model(directory: Path, seed: int) -> Path:
    return write_tokenized(directory, seed, byte_level(TEXTS[0]))


def write_spectrum(root: Path) -> Path:
    """Write a spectrum of four points and a parent: one is equal to another, one failed, one cannot be loaded."""
    spectrum = root / "spectrum"
    write_model(spectrum / "t-0", 1)
    shutil.copytree(spectrum / "t-0", spectrum / "t-1")
    (spectrum / "t-1" / "README.md").write_text("another card")
    write_model(spectrum / "t-3", 2)
    config = json.loads((spectrum / "t-3" / "config.json").read_text())
    (spectrum / "t-3" / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    points = [Point(f"t-{k}", f"t-{k}", {"t": k}, "", f"f{k}", "complete", "") for k in range(4)]
    points[2] = Point("t-2", "t-2", {"t": 2}, "", "", "failed", "no such tensor")
    parent = Parent("parent", str(write_model(root / "parent", 4)), True)
    record = Spectrum("0", "", ("t",), (parent,), tuple(points))
    (spectrum / "spectrum.json").write_text(record.dump())
    return spectrum


def write_judge(directory: Path) -> str:
    """Write a command that finds all models half right; return it as a task."""
    (directory / "judge.py").write_text("print('{\"accuracy\": 0.5}')")
    return f"command:{sys.executable} {directory}/judge.py {{model}}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    root = tmp_path_factory.mktemp("evaluation")
    (root / "sums.yml").write_text(TASK)
    spectrum = write_spectrum(root)
    events: list[EvaluationEvent] = []
    found = raymerge.evaluate(spectrum, root / "sums.yml", on_event=events.append)
    return Finished(root, spectrum, found, events)


def test_points_and_parents_are_evaluated_and_written(finished: Finished) -> None:
    names = ["t-0", "t-1", "t-3", "parent"]
    assert [each.model for each in finished.found] == names
    for each in finished.found:
        [path] = (finished.spectrum / "evaluations" / each.model).glob("sums-*.json")
        assert parse_evaluation(path.read_bytes()) == each
    first = finished.found[0]
    lines = (finished.spectrum / "evaluations" / "t-0" / first.samples).read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    assert len(samples) == 12
    assert first.accuracy
    assert first.accuracy.mean == sum(each["score"] for each in samples) / 12
    assert first.tokens
    assert first.tokens.mean == sum(each["tokens"] for each in samples) / 12
    for each in samples:
        is_right = each["detail"]["answer"] == str(each["detail"]["expected"])
        assert each["score"] == is_right


def test_equal_models_are_evaluated_once(finished: Finished) -> None:
    first, second = finished.found[:2]
    assert first.digest == second.digest
    assert first.accuracy == second.accuracy
    assert {event.model for event in finished.events if isinstance(event, Sampled)} == {"t-0", "parent"}
    samples = [finished.spectrum / "evaluations" / each.model / each.samples for each in (first, second)]
    assert samples[0].read_bytes() == samples[1].read_bytes()


def test_a_model_that_cannot_be_loaded_is_marked_and_the_others_go_on(finished: Finished) -> None:
    broken, parent = finished.found[2:]
    assert broken.state == "failed"
    assert "nonesuch" in broken.error
    assert broken.accuracy is None
    assert parent.state == "complete"


def test_points_that_failed_are_named(finished: Finished) -> None:
    [begun] = [event for event in finished.events if isinstance(event, Begun)]
    assert begun.skipped == ("t-2: no such tensor",)


def test_a_model_that_is_gone_is_named_and_the_others_go_on(tmp_path: Path, finished: Finished) -> None:
    spectrum = shutil.copytree(finished.spectrum, tmp_path / "spectrum")
    shutil.rmtree(spectrum / "t-1")
    events: list[EvaluationEvent] = []
    found = raymerge.evaluate(spectrum, write_judge(tmp_path), on_event=events.append)
    assert [(each.model, each.state) for each in found] == [(n, "complete") for n in ("t-0", "t-3", "parent")]
    [begun] = [event for event in events if isinstance(event, Begun)]
    assert f"t-1: its model is no longer in {spectrum}/t-1" in begun.skipped[0]


def test_what_is_finished_is_not_done_again(finished: Finished) -> None:
    events: list[EvaluationEvent] = []
    models = [finished.spectrum / "t-0", finished.root / "parent"]
    out = str(finished.spectrum / "evaluations")
    found = raymerge.evaluate(models, finished.root / "sums.yml", out=out, on_event=events.append)
    assert found == [finished.found[0], finished.found[3]]
    assert all(event.is_cached for event in events if isinstance(event, Evaluated))
    assert not any(isinstance(event, Sampled) for event in events)


@pytest.mark.slow  # another process with transformers
def test_more_samples_and_fewer_items_share_what_was_generated(finished: Finished) -> None:
    events: list[EvaluationEvent] = []
    model = finished.spectrum / "t-0"
    out = str(finished.spectrum / "evaluations")
    [found] = raymerge.evaluate(model, finished.root / "sums.yml", out=out, samples=6, limit=2, on_event=events.append)
    assert (found.num_items, found.num_samples, found.samples) == (2, 6, finished.found[0].samples)
    # eight were there, which a slow machine tells before it has the first of the others
    assert {event.num_finished for event in events if isinstance(event, Sampled)} | {8} == {8, 9, 10, 11, 12}
    assert sorted(found.other) == ["pass@2", "pass@4", "pass@6"]


def test_models_of_one_name_are_told_apart() -> None:
    named = _make_unique([Subject(name, name, name) for name in ("m", "m", "m-2")])
    assert [each.name for each in named] == ["m", "m-2", "m-2-2"]


def test_samples_that_a_killed_run_has_kept_of_a_command_do_not_count(tmp_path: Path) -> None:
    """The command draws its items, so that they are other ones each time."""
    write_tokenized(tmp_path / "model", 0, byte_level(TEXTS[0]))
    drawn = tmp_path / "drawn"
    (tmp_path / "draw.py").write_text(f"import json; print(json.dumps({{'samples': json.load(open({str(drawn)!r}))}}))")
    drawn.write_text(json.dumps([{"item": item, "score": 0} for item in "abc"]))
    command = f"command:{sys.executable} -S -E {tmp_path}/draw.py {{model}}"
    [found] = raymerge.evaluate(tmp_path / "model", command, out=str(tmp_path / "out"))
    samples = tmp_path / "out" / "model" / found.samples
    samples.write_text("".join(samples.read_text().splitlines(keepends=True)[:2]))
    for result in samples.parent.glob("*.json"):
        result.unlink()
    drawn.write_text(json.dumps([{"item": item, "score": 1} for item in "bcd"]))
    [again] = raymerge.evaluate(tmp_path / "model", command, out=str(tmp_path / "out"))
    assert again.accuracy
    assert (again.num_items, again.accuracy.mean) == (3, 1.0)
    assert len(samples.read_text().splitlines()) == 4


def test_an_evaluation_that_another_run_is_doing_is_waited_for(tmp_path: Path, finished: Finished) -> None:
    out, task = tmp_path / "out", write_judge(tmp_path)
    found = raymerge.evaluate(finished.spectrum / "t-0", task, out=str(out))
    [path] = (out / "t-0").glob("*.json")
    content = path.read_bytes()
    path.unlink()
    with open_stores() as stores, ThreadPoolExecutor() as pool:
        with stores.at(str(out)).lock(f"{path.parent}/{found[0].samples}.lock"):
            other = pool.submit(raymerge.evaluate, finished.spectrum / "t-0", task, out=str(out))
            with pytest.raises(TimeoutError):
                other.result(0.5)
            path.write_bytes(content)
        assert other.result() == found


def test_results_that_lie_where_they_do_not_belong_do_not_count(tmp_path: Path, finished: Finished) -> None:
    out, task = tmp_path / "out", write_judge(tmp_path)
    found = raymerge.evaluate(finished.spectrum / "t-0", task, out=str(out))
    [path] = (out / "t-0").glob("*.json")
    for wrong in ({"digest": "0"}, {"model": "../t-0"}, {"samples": "../../x"}):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"accuracy": None} | wrong))
        again = raymerge.evaluate(finished.spectrum / "t-0", task, out=str(out))
        assert replace(again[0], seconds=0) == replace(found[0], seconds=0)


def test_a_model_that_is_not_there(tmp_path: Path, finished: Finished) -> None:
    with pytest.raises(CheckpointError, match=r"no such directory.*did you mean"):
        raymerge.evaluate(finished.spectrum / "t-00", finished.root / "sums.yml")
    with pytest.raises(CheckpointError, match="neither a model nor a spectrum"):
        raymerge.evaluate(tmp_path, finished.root / "sums.yml")


def test_a_parent_that_is_gone_is_marked_and_the_others_go_on(tmp_path: Path, finished: Finished) -> None:
    spectrum = shutil.copytree(finished.spectrum, tmp_path / "spectrum")
    record = json.loads((spectrum / "spectrum.json").read_text())
    record["parents"][0]["model"] = "gone/parent/here"
    (spectrum / "spectrum.json").write_text(json.dumps(record))
    events: list[EvaluationEvent] = []
    found = raymerge.evaluate(spectrum, write_judge(tmp_path), on_event=events.append)
    states = [(each.model, each.state) for each in found]
    assert states == [("t-0", "complete"), ("t-1", "complete"), ("t-3", "complete"), ("parent", "failed")]
    assert "gone/parent/here: no such directory" in found[3].error
    assert next(event.is_cached for event in events if isinstance(event, Evaluated)) is False
    assert not list((spectrum / "evaluations/parent").glob("judge*")), "it may be there again"


def test_tasks_that_are_none(finished: Finished) -> None:
    with pytest.raises(ConfigError, match="no task is given"):
        raymerge.evaluate(finished.spectrum, [])
    with pytest.raises(ConfigError, match=r"A task is a \.yml or \.jsonl file"):
        raymerge.evaluate(finished.spectrum, "nonesuch:x")
    with pytest.raises(ConfigError, match="twice the same"):
        raymerge.evaluate(
            finished.spectrum, [finished.root / "sums.yml", f"{finished.root}/../{finished.root.name}/sums.yml"]
        )


@pytest.mark.parametrize("wrong", [{"samples": 0}, {"seed": -1}, {"temperature": -1.0}, {"batch_size": 0}])
def test_options_out_of_range(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"--{next(iter(wrong)).replace('_', '-')} is"):
        raymerge.EvaluateOptions(**wrong)  # type: ignore[arg-type]
