from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.evaluation.evaluator import Task
from raymerge.pipeline.evaluation.evaluators.task_file import TaskFiles
from raymerge.pipeline.evaluation.hub_results import check_benchmarks, write_hub_result
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.results import Estimate, Evaluation
from raymerge.pipeline.evaluation.subjects import Subject
from raymerge.pipeline.output.journal import LOCK, Journal
from raymerge.pipeline.stores.open import Stores
from tests.servers.hub import HubServer


def make_task(tmp_path: Path, benchmark: str) -> Task:
    path = tmp_path / "task.yml"
    path.write_text(f"items: [{{prompt: a, answer: 1}}]\n{benchmark}")
    return TaskFiles().prepare(str(path), EvaluateOptions())


def make_evaluation(accuracy: float | None) -> Evaluation:
    estimate = None if accuracy is None else Estimate(accuracy, 0.0, 1.0)
    return Evaluation(
        model="a",
        url="a",
        digest="",
        task="t",
        task_digest="",
        sampling={},
        state="failed" if accuracy is None else "complete",
        error="",
        num_items=198,
        num_samples=4,
        accuracy=estimate,
        tokens=None,
        loss=None,
        thinking=None,
        cut_off=None,
        other={},
        samples="",
        seconds=0.0,
    )


def test_a_result_is_as_the_hub_reads_it(tmp_path: Path, stores: Stores) -> None:
    task = make_task(tmp_path, "benchmark: {dataset: Idavidrein/gpqa, task: gpqa_diamond}")
    subject = Subject("a", str(tmp_path / "a"), "a")
    write_hub_result(stores, subject, task, make_evaluation(0.4125))
    written = yaml.safe_load((tmp_path / "a/.eval_results/gpqa_diamond.yaml").read_text())
    dataset = {"id": "Idavidrein/gpqa", "task_id": "gpqa_diamond"}
    assert written == [{"dataset": dataset, "value": 41.25, "notes": "mean of 4 samples of each of 198 items"}]


def test_nothing_is_written_for_what_failed_or_is_gone(tmp_path: Path, stores: Stores) -> None:
    task = make_task(tmp_path, "benchmark: {dataset: org/data, task: t}")
    write_hub_result(stores, Subject("a", str(tmp_path / "a"), "a"), task, make_evaluation(None))
    write_hub_result(stores, Subject("a", "", "a"), task, make_evaluation(0.5))
    assert not (tmp_path / "a").exists()


def test_what_cannot_be_written_is_told_before_anything_runs(tmp_path: Path, stores: Stores) -> None:
    with pytest.raises(ConfigError, match="no task says which benchmark"):
        check_benchmarks(stores, [make_task(tmp_path, "")], [])
    task = make_task(tmp_path, "benchmark: {dataset: org/data, task: t}")
    with pytest.raises(ConfigError, match="https://host/a: no file can be added there"):
        check_benchmarks(stores, [task], [Subject("a", "https://host/a", "https://host/a")])
    parent = Subject("a", "hf://org/a@1a2b", "org/a", is_parent=True)
    check_benchmarks(stores, [task], [parent])
    write_hub_result(stores, parent, task, make_evaluation(0.5))
    with pytest.raises(ConfigError, match="as the Hub has them"):
        make_task(tmp_path, "benchmark: gpqa")
    with pytest.raises(ConfigError, match="as the Hub has them"):
        make_task(tmp_path, "benchmark: {dataset: org/data, task: ../t}")


def test_results_are_commits_to_repositories_of_the_hub(
    tmp_path: Path, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(tmp_path, "benchmark: {dataset: org/data, task: t}")
    with HubServer(tmp_path / "hub") as hub:
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for name in ("me/a", "me/b", "org/a"):
            hub.create_repo(name)
        point, given = Subject("a", "hf://me/a", "hf://me/a"), Subject("b", f"hf://me/b@{hub.get_head('me/b')}", "me/b")
        check_benchmarks(stores, [task], [point, given])
        for subject in (point, given, point):
            write_hub_result(stores, subject, task, make_evaluation(0.5))
        for name in ("me/a", "me/b"):
            assert yaml.safe_load(hub.read_files(name)[".eval_results/t.yaml"])[0]["value"] == 50
            assert [each.title for each in hub.repos[name].get_head("main").iter_history()][:2] == [
                "Result of t",
                "initial commit",
            ]
        storage = stores.at("hf://me/a")
        with storage.lock(f"hf://me/a/{LOCK}"):  # of a merge that is killed
            Journal(stores, "hf://me/a", "fingerprint").begin(["config.json"])
            storage.write("hf://me/a/config.json", b"half of a model")
        write_hub_result(stores, point, task, make_evaluation(0.75))
        assert yaml.safe_load(hub.read_files("me/a")[".eval_results/t.yaml"])[0]["value"] == 75
        assert "config.json" not in hub.read_files("me/a")
        storage.publish("hf://me/a", "Merge")
        assert hub.read_files("me/a")["config.json"] == b"half of a model", "the merge goes on"
        with pytest.raises(OutputError, match="org/a"):
            check_benchmarks(stores, [task], [Subject("a", "hf://org/a", "org/a")])


def test_the_benchmark_is_no_part_of_the_digest(tmp_path: Path) -> None:
    plain = make_task(tmp_path, "")
    assert make_task(tmp_path, "benchmark: {dataset: org/data, task: t}").digest == plain.digest
