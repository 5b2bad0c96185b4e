"""What a plan says a merge takes, against what it takes: one fresh process for each op."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import plan
from raymerge.ops.registry import Base, Op, load_ops
from raymerge.pipeline.cli.methods import measure_demand
from raymerge.pipeline.plan.memory.projection import MAX_FETCH_NBYTES
from raymerge.pipeline.plan.results import MergeReport
from raymerge.pipeline.progress.codec import read_event
from raymerge.pipeline.stores.settings import Library
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import write_checkpoint, write_config
from tests.commands import run_command
from tests.memory_promise import NUM_ELEMENTS, SCRIPT, SLACK_NBYTES, write_models
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.servers.s3_clients import open_store
from tests.statistics import write_statistics

MEMORY = "32MiB"
ROW = 4096
NUM_FILLING = MAX_FETCH_NBYTES // 6 // ROW * ROW
"""Elements of a tensor of which three models have as many bytes as are fetched at once."""
VALUES = {"weight": 1.0, "density": 0.5, "t": 0.5, "alpha": 0.5}


def make_config(op: Op, models: list[str]) -> dict[str, Any]:
    """Return a merge of as many models as the op takes, with every parameter that it requires."""
    base, *others = models
    if op.base is Base.INPUT:
        others = models
    parameters = {p.name: VALUES[p.name] for p in op.parameters if p.default is None or p.name == "density"}
    return {
        "merge_method": op.name,
        **({"base_model": base} if op.base is Base.REQUIRED else {}),
        "models": [
            {"model": model, **write_statistics(op, model, torch.bfloat16)} for model in others[: op.max_models]
        ],
        "parameters": parameters,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("models")
    return {
        "tiny": write_models(directory / "tiny", 100),
        "large": write_models(directory / "large", NUM_ELEMENTS),
        "rows": write_models(directory / "rows", NUM_ELEMENTS, shape=(-1, ROW)),
        "tiny matrix": write_models(directory / "tiny matrix", 100, shape=(-1, 10)),
        "matrix": write_models(directory / "matrix", NUM_ELEMENTS, shape=(-1, ROW // 2)),
    }


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
@pytest.mark.parametrize("name", load_ops())
def test_peak_memory_is_as_projected(name: str, models: dict[str, list[str]], tmp_path: Path) -> None:
    op = load_ops()[name]
    is_by_rows = measure_demand(op)[1].held == "rows"  # a tensor of one dimension is a single row
    kinds = "tiny", "rows" if is_by_rows else "large"
    memory = MEMORY
    if op.statistics is not None and op.statistics.is_whole:
        kinds, memory = ("tiny matrix", "matrix"), "512MiB"
    configs = [write_config(tmp_path / f"{kind}.yml", make_config(op, models[kind])) for kind in kinds]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, configs), str(tmp_path), memory], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    assert (figures["num_workers"], figures["num_shards"]) == (1, 2)
    assert figures["projected"] <= figures["allowed"]
    assert figures["projected"] // 2 - SLACK_NBYTES <= figures["used"] <= figures["projected"] + SLACK_NBYTES


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
def test_many_blocks_take_no_more_than_few(models: dict[str, list[str]], tmp_path: Path) -> None:
    """What torch's selection keeps between blocks must not hold freed memory back: `pcb` selects most."""
    large = write_models(tmp_path / "models", 4 * NUM_ELEMENTS, num_tensors=1)
    op = load_ops()["pcb"]
    configs = [
        write_config(tmp_path / f"{n}.yml", make_config(op, each)) for n, each in enumerate((models["tiny"], large))
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, configs), str(tmp_path), "1GiB"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["used"] <= figures["projected"] + SLACK_NBYTES


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
@pytest.mark.parametrize(("count", "rank"), [(1, 64), (30, 16)])
def test_adapters_take_no_more_than_is_planned(count: int, rank: int, tmp_path: Path) -> None:
    configs = []
    for kind, rows, columns in (("tiny", 10, 10), ("large", NUM_ELEMENTS // ROW, ROW)):
        tensors = {f"w{k}.weight": torch.rand(rows, columns).to(torch.bfloat16) for k in range(2)}
        base = write_checkpoint(tmp_path / f"base {kind}", tensors, {})
        models = []
        for number in range(count):
            factors: dict[str, torch.Tensor] = {}
            for k in range(2):
                drawn = draw_factors(f"w{k}", rows, columns, rank, seed=number)
                factors |= {name: values.to(torch.bfloat16) for name, values in drawn.items()}
            models.append({"model": f"{base}+{write_adapter(tmp_path / f'{kind}{number}', factors, r=rank)}"})
        config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1}, "dtype": "bfloat16"}
        configs.append(write_config(tmp_path / f"{kind}.yml", config))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, configs), str(tmp_path), "128MiB"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout)
    assert figures["projected"] // 2 - SLACK_NBYTES <= figures["used"] <= figures["projected"] + SLACK_NBYTES


MODEL_IN = {"s3": "s3://{bucket}/{name}", "hub": "org/{name}", "local": "{directory}/{name}"}
OUTPUT_IN = {"s3": "s3://{bucket}/merged", "hub": "hf://me/merged", "local": "{directory}/merged"}


@pytest.fixture
def places(
    tmp_path: Path, bucket: str, s3_server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> Iterator[dict[str, str]]:
    """Models that fill the buffers, on disk, in a bucket and on a Hub, in an environment that leads to both."""
    store = open_store(s3_server, bucket)
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for model in map(Path, write_models(tmp_path / "models", NUM_FILLING, num_tensors=3)):
            hub.create_repo(f"org/{model.name}")
            hub.upload(f"org/{model.name}", {file.name: file for file in model.iterdir()})
            for file in model.iterdir():
                store.put(f"{model.name}/{file.name}", file)
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        yield {"bucket": bucket, "directory": str(tmp_path / "models")}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
@pytest.mark.parametrize(
    ("source", "target", "options"),
    [
        ("s3", "s3", ("--workers", "2")),
        ("s3", "local", ("--workers", "1")),
        ("s3", "s3", ("--workers", "2", "--storage", "fsspec")),
        ("hub", "hub", ("--workers", "2")),
        ("local", "local", ("--workers", "1", "--ray")),
        ("s3", "s3", ("--workers", "1", "--ray")),
    ],
)
def test_workers_keep_to_the_plan_with_every_store_and_on_ray(
    source: str, target: str, options: tuple[str, ...], places: dict[str, str], tmp_path: Path
) -> None:
    models = [MODEL_IN[source].format(name=name, **places) for name in ("base", "a", "b")]
    config = write_config(tmp_path / "merge.yml", make_config(load_ops()["ties"], models))
    peak = projected = 0
    for attempt in range(3):  # how many buffers of 8 MiB are in use at once depends on the store and on other work
        out = OUTPUT_IN[target].format(**places) + str(attempt)
        done = run_command("merge", config, out, *options, "--log-json", "--shard-size", "44MiB")
        report = read_event(done.out.splitlines()[-1])
        assert isinstance(report, MergeReport), done
        assert report.num_shards == 2
        storage: Library = "fsspec" if "fsspec" in options else "auto"
        the_plan = plan(config, out=out, storage=storage, workers=2, shard_size="44MiB", ray="--ray" in options)
        assert report.projected_mem == max(task.projected_mem for task in the_plan.tasks)
        assert report.peak_measured_mem <= report.projected_mem
        assert report.over_nbytes == 0
        peak, projected = max(peak, report.peak_measured_mem), report.projected_mem
        if projected <= 1.5 * peak:
            break
    assert projected <= 1.5 * peak
