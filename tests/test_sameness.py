"""The same bytes, whatever the workers, the memory, the hash seed, and the way the inputs are cut into files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.plan.memory import places, shares
from tests.checkpoints import read_files, read_tensors, write_checkpoint, write_family
from tests.memory_promise import SLACK_NBYTES
from tests.method_configs import METHODS, make_config

SHARD_NBYTES = 200_000
"""The embedding, of some megabytes, gets a file of its own; there is work for four workers."""


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    directory = tmp_path_factory.mktemp("family")
    return write_family(directory, 2, num_layers=3, dtype=torch.bfloat16, vocab=30_001, hidden=80)


@pytest.fixture(scope="module", params=METHODS)
def expected(
    request: pytest.FixtureRequest, family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, bytes]]:
    """A config, and the files of an output that was made with plenty of memory on one thread."""
    config = make_config(request.param, family)
    out = tmp_path_factory.mktemp("plenty") / "merged"
    assert not any(task.reread_nbytes for task in plan(config, memory="4GiB", workers=1).tasks)
    merge(config, out, memory="4GiB", workers=1, shard_size=SHARD_NBYTES, seed=5)
    return config, read_files(out)


@pytest.mark.parametrize(
    ("workers", "memory", "is_streamed"),
    [(1, "22MiB", True), (2, "44MiB", True), (4, "88MiB", True), (2, "4GiB", False), (4, "4GiB", False)],
)
def test_workers_and_memory(
    workers: int, memory: str, is_streamed: bool, expected: tuple[dict[str, Any], dict[str, bytes]], tmp_path: Path
) -> None:
    config, files = expected
    the_plan = plan(config, memory=memory, workers=workers, shard_size=SHARD_NBYTES)
    assert the_plan.num_workers == workers
    assert max(task.num_threads for task in the_plan.tasks) == max(1, workers // 2), "for the embedding"
    has_passes = config["merge_method"] != "linear"
    assert any(task.reread_nbytes for task in the_plan.tasks) is (is_streamed and has_passes)
    merge(config, tmp_path / "merged", memory=memory, workers=workers, shard_size=SHARD_NBYTES, seed=5)
    assert read_files(tmp_path / "merged") == files


@pytest.mark.parametrize("workers", [1, 3])
def test_a_large_tensor_takes_the_memory_of_several_workers_to_be_read_once(
    workers: int,
    expected: tuple[dict[str, Any], dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(places, "_CACHED", 0)  # as where the page cache does not hold the inputs,
    monkeypatch.setattr(shares, "_SMALL", 1)  # and other tensors are most of them
    config, files = expected
    the_plan = plan(config, memory="66MiB", workers=workers, shard_size=SHARD_NBYTES)
    has_passes = config["merge_method"] != "linear"
    large = [task for task in the_plan.tasks if task.num_shares > 1]
    assert (the_plan.num_workers, bool(large)) == (workers, has_passes and workers > 1)
    assert not any(task.reread_nbytes for task in the_plan.tasks)
    report = merge(config, tmp_path / "merged", memory="66MiB", workers=workers, shard_size=SHARD_NBYTES, seed=5)
    assert report.read_nbytes == sum(task.read_nbytes for task in the_plan.tasks)
    assert workers == 1 or report.over_nbytes <= SLACK_NBYTES  # one works in this process, which has more to do
    assert read_files(tmp_path / "merged") == files


SCRIPT = """
import json, sys
from raymerge import merge
for config, out in json.load(sys.stdin):
    merge(config, out, shard_size=%d, workers=2, seed=5)
"""


@pytest.fixture(scope="module")
def on_one_thread(
    small_family: tuple[Path, ...], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, bytes]]:
    """The output of every method."""
    outs = {method: tmp_path_factory.mktemp(method) / "merged" for method in METHODS}
    for method, out in outs.items():
        merge(make_config(method, small_family), out, shard_size=5000, workers=1, seed=5)
    return {method: read_files(out) for method, out in outs.items()}


@pytest.mark.parametrize("hash_seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_hash_seed(
    hash_seed: int, tmp_path: Path, small_family: tuple[Path, ...], on_one_thread: dict[str, dict[str, bytes]]
) -> None:
    jobs = [(make_config(method, small_family), str(tmp_path / method / "merged")) for method in METHODS]
    subprocess.run(
        [sys.executable, "-c", SCRIPT % 5000],
        input=json.dumps(jobs),
        text=True,
        check=True,
        env={"PYTHONHASHSEED": str(hash_seed)},
    )
    assert {Path(out).parent.name: read_files(Path(out)) for _, out in jobs} == on_one_thread


@pytest.fixture(scope="module")
def small_family(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    return write_family(tmp_path_factory.mktemp("small"), 2, num_layers=3, dtype=torch.bfloat16, num_shards=2)


@pytest.mark.parametrize("method", METHODS)
def test_inputs_cut_in_another_way(method: str, small_family: tuple[Path, ...], tmp_path: Path) -> None:
    """Tensors, index and config are the same; the manifest names the other inputs."""
    whole = []
    for model in small_family:
        tensors = dict(reversed(read_tensors(model).items()))
        whole.append(write_checkpoint(tmp_path / model.name, tensors, json.loads((model / "config.json").read_text())))
    outputs = []
    for label, models in (("sharded", small_family), ("whole", whole)):
        merge(make_config(method, models), tmp_path / label / "merged", shard_size=5000, seed=5)
        files = read_files(tmp_path / label / "merged")
        outputs.append({name: files[name] for name in files if name.endswith((".safetensors", "index.json"))})
        outputs[-1]["config.json"] = files["config.json"]
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("method", METHODS)
def test_where_the_inputs_lie_does_not_matter(method: str, small_family: tuple[Path, ...], tmp_path: Path) -> None:
    moved = []
    for model in small_family:
        (tmp_path / "moved").mkdir(exist_ok=True)
        moved.append(tmp_path / "moved" / model.name)
        moved[-1].symlink_to(model)
    plans = [plan(make_config(method, models)) for models in (small_family, moved)]
    assert plans[0].fingerprint == plans[1].fingerprint


def test_the_seed_matters_to_random_methods_only(small_family: tuple[Path, ...], tmp_path: Path) -> None:
    for method in METHODS:
        config = make_config(method, small_family)
        outputs = []
        for seed in (1, 2):
            merge(config, tmp_path / f"{method}{seed}" / "merged", seed=seed)
            outputs.append((tmp_path / f"{method}{seed}" / "merged" / "model.safetensors").read_bytes())
        assert (outputs[0] == outputs[1]) is (method != "dare_ties")
