"""A search on a Ray cluster: its trials are evaluated there, several at once, and come out as on one machine."""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.cluster_utils import Cluster

import raymerge
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint

JUDGE = """
import hashlib, json, os, sys, time
from pathlib import Path

model, marks = Path(sys.argv[1]), Path(sys.argv[2])
own = marks / model.name
own.write_text(Path(f"/proc/{os.getppid()}/cmdline").read_text().replace("\\0", " "))
deadline = time.monotonic() + 300
while len(list(marks.iterdir())) < 2 and time.monotonic() < deadline:
    time.sleep(0.05)
if time.monotonic() > deadline:
    sys.exit("no other is evaluated at the same time")
[shard] = model.glob("*.safetensors")
number = int(hashlib.sha256(shard.read_bytes()).hexdigest()[:8], 16)
print(json.dumps({"accuracy": number % 1000 / 1000, "tokens": number // 1000 % 1000}))
"""


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    directory = tempfile.mkdtemp(prefix="rm-", dir="/tmp")
    Path(directory, "ray").mkdir()
    monkeypatch.setenv("RAY_TMPDIR", directory)
    head = {"num_cpus": 2, "num_gpus": 0, "include_dashboard": False, "temp_dir": f"{directory}/ray"}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    shutil.rmtree(directory, ignore_errors=True)


def write_models(root: Path) -> dict[str, Any]:
    """Write two models; return a recipe for them."""
    for k in range(2):
        tensors = llama_tensors(k, 1)
        tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], float(k))
        write_checkpoint(root / f"model{k}", tensors, llama_config(1))
    return {
        "merge_method": "linear",
        "models": [{"model": str(root / f"model{k}")} for k in range(2)],
        "parameters": {"weight": 1.0},
        "search": {"parameters": {f"weight[{k}]": {"min": 0.1, "max": 1.0} for k in range(2)}},
    }


@pytest.mark.slow
def test_ray_started_here_merges_and_evaluates(tmp_path: Path) -> None:
    recipe = write_models(tmp_path)
    (tmp_path / "judge.py").write_text(JUDGE)
    (tmp_path / "marks").mkdir()
    report = raymerge.search(
        recipe,
        tmp_path / "out",
        [f"command:judge={sys.executable} {tmp_path}/judge.py {{model}} {tmp_path}/marks"],
        raymerge.SearchOptions(budget=1, batch=1),
        merging=raymerge.MergeOptions(ray=True, workers=2),
        evaluating=raymerge.EvaluateOptions(workers=2),
    )
    assert [trial.error for trial in report.trials] == [""]
    assert {path.name: "ray::" in path.read_text() for path in (tmp_path / "marks").iterdir()} == dict.fromkeys(
        ("trial-0000", "model0", "model1"), True
    )
    assert not ray.is_initialized()


@pytest.mark.slow
def test_trials_are_evaluated_side_by_side_and_are_those_of_one_machine(cluster: Cluster, tmp_path: Path) -> None:
    recipe = write_models(tmp_path)
    (tmp_path / "judge.py").write_text(JUDGE)
    found = {}
    for name, address in (("cluster", cluster.address), ("here", None)):
        (tmp_path / name / "marks").mkdir(parents=True)
        found[name] = raymerge.search(
            recipe,
            tmp_path / name / "out",
            [f"command:judge={sys.executable} {tmp_path}/judge.py {{model}} {tmp_path / name}/marks"],
            raymerge.SearchOptions(budget=8, batch=4),
            merging=raymerge.MergeOptions(address=address),
            evaluating=raymerge.EvaluateOptions(workers=2),
        )
    judges = {name: {p.name: p.read_text() for p in (tmp_path / name / "marks").iterdir()} for name in found}
    assert set(judges["cluster"]) == set(judges["here"])
    assert all("ray::" in parent for parent in judges["cluster"].values())
    assert not any("ray::" in parent for parent in judges["here"].values())
    assert found["cluster"].trials == found["here"].trials
    assert [trial.error for trial in found["here"].trials] == [""] * 8
    assert found["cluster"].values == found["here"].values
    assert found["cluster"].parents == found["here"].parents
