"""Evaluations on a Ray cluster: placed by GPUs, which are pretended, and done again where a worker is killed."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import ray
from ray.cluster_utils import Cluster

import raymerge
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.events import EvaluationEvent, Repeated, Sampled
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

JUDGE = """
import json, os, signal, sys, time
from pathlib import Path

model, name = Path(sys.argv[1]), sys.argv[2]
marks = Path(sys.argv[3])
number = len(list(marks.glob(f"{name}-*")))
(marks / f"{name}-{number}").write_text(os.environ["CUDA_VISIBLE_DEVICES"])
if name == "killed" and not number:
    os.kill(os.getppid(), signal.SIGKILL)
if name == "slow":
    time.sleep(5)
if name == "slow" or name == "fast":  # two at once
    deadline = time.monotonic() + 300
    while len({path.name[:4] for path in marks.glob("[sf]*-0")}) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
print(json.dumps({"accuracy": 0.5, "files": len(list(model.iterdir()))}))
"""
TASK = """
items: [{prompt: the quick, answer: 1}, {prompt: lazy dog, answer: 2}, {prompt: "7", answer: 7}]
temperature: 1.0
max_new_tokens: 12
samples: 40
"""
NUM_SAMPLES = 120


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A node with two GPUs, none of which is there."""
    directory = tempfile.mkdtemp(prefix="rm-", dir="/tmp")
    Path(directory, "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", directory)
    head = {"num_cpus": 2, "num_gpus": 2, "include_dashboard": False, "temp_dir": f"{directory}/ray"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def write_models(root: Path, *names: str) -> list[Path]:
    return [write_tokenized(root / name, number, byte_level(TEXTS[0])) for number, name in enumerate(names)]


def kill_worker(directory: str) -> None:
    """Kill the Ray worker, of the cluster in this directory, whose model is generating."""
    for path in Path("/proc").glob("[0-9]*"):
        try:
            is_there = directory.encode() in (path / "environ").read_bytes()
            if is_there and b"transformers_worker" in (path / "cmdline").read_bytes():
                status = (path / "status").read_text()
                os.kill(int(status.partition("PPid:")[2].split()[0]), signal.SIGKILL)
        except OSError:
            continue


@pytest.mark.slow
def test_commands_are_placed_by_gpus_and_done_again_where_a_worker_dies(
    cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One works for longer than an item may say nothing; a planned point is merged where it is evaluated."""
    monkeypatch.setattr("raymerge.cluster.ray.silence.HANG_SECONDS", 3.0)
    monkeypatch.chdir(tmp_path)
    models = write_models(tmp_path, "slow", "fast", "killed")
    recipe = {"merge_method": "linear", "models": [{"model": "slow"}, {"model": "fast"}], "parameters": {"weight": 1}}
    raymerge.sweep(recipe, "planned", {"weight[1]": [0.5]}, materialize="none")
    marks = tmp_path / "marks"
    marks.mkdir()
    (tmp_path / "judge.py").write_text(JUDGE)
    events: list[EvaluationEvent] = []
    command = f"command:{sys.executable} judge.py {{model}} {{name}} {marks}"
    evaluate = partial(raymerge.evaluate, address=cluster.address, out=str(tmp_path / "out"), on_event=events.append)
    found = evaluate(models, command)
    assert {each.model: each.state for each in found} == dict.fromkeys(("slow", "fast", "killed"), "complete")
    assert [event.reason.partition(" (")[0] for event in events if isinstance(event, Repeated)] == ["its worker died"]
    assert {(marks / f"{name}-0").read_text() for name in ("slow", "fast")} == {"0", "1"}
    assert sorted(path.name for path in marks.iterdir()) == ["fast-0", "killed-0", "killed-1", "slow-0"]
    [point] = evaluate("planned", command, only=["weight1-0.5"])
    assert point.other["files"] > 4
    assert not list((tmp_path / "planned").glob("weight*"))
    with pytest.raises(raymerge.RaymergeError, match=r"gpus-per-model 4: no node .* most on one is 2"):
        evaluate(models, f"command:other={command.partition(':')[2]}", gpus_per_model=4)


@pytest.mark.slow
def test_samples_that_a_killed_worker_has_finished_are_kept(cluster: Cluster, tmp_path: Path) -> None:
    [model] = write_models(tmp_path, "model")
    (tmp_path / "sums.yml").write_text(TASK)
    [here] = raymerge.evaluate(model, tmp_path / "sums.yml", out=str(tmp_path / "here"), batch_size=1)
    events, told = list[EvaluationEvent](), [0]

    def watch(event: EvaluationEvent) -> None:
        if isinstance(event, Sampled):
            if event.num_finished and not any(told):
                kill_worker(os.environ["RAY_TMPDIR"])
            told.append(event.num_finished)
        events.append(event)

    out = tmp_path / "out"
    evaluate = partial(raymerge.evaluate, out=str(out), batch_size=1, gpus_per_model=0)
    [found] = evaluate(model, tmp_path / "sums.yml", address=cluster.address, on_event=watch)
    assert [type(event) for event in events].count(Repeated) == 1
    num_done = sum(after != before for before, after in pairwise(told))  # the same is told again where it takes long
    assert num_done <= NUM_SAMPLES, "what was finished is not done again"
    assert (found.accuracy, found.tokens, found.thinking) == (here.accuracy, here.tokens, here.thinking)
    lines = [(root / "model" / here.samples).read_text().splitlines() for root in (tmp_path / "here", out)]
    assert sorted(lines[0]) == sorted(lines[1])


def test_gpus_that_are_not_there_and_options_for_no_cluster(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"gpus-per-model 1: 1 at once take more GPUs than this machine has \(0\)"):
        raymerge.evaluate(write_models(tmp_path, "a"), f"command:{sys.executable} -V {{model}}", gpus_per_model=1)
    for wrong in (
        {"gpus_per_model": 1.5},
        {"gpus_per_model": -1.0},
        {"shared_filesystem": True},
        {"ray": True, "address": "auto"},
    ):
        with pytest.raises(ConfigError, match="--" + next(iter(wrong)).replace("_", "-")):
            raymerge.EvaluateOptions(**wrong)
