"""Merges of adapters from and to real stores, interrupted, in little memory and with many workers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from raymerge import merge, plan, verify
from raymerge.pipeline.errors import MemoryLimitError, OutputError
from raymerge.pipeline.plan.report import plan_json, plan_table
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import read_files, write_config
from tests.commands import Cli
from tests.memory_promise import SCRIPT, SLACK_NBYTES
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.stored_models import download, upload, without_own

SHIPPED = sorted((Path(__file__).parents[2] / "configs" / "adapters").glob("*.yml"))
MODULES = [f"model.layers.{k}.q_proj" for k in range(3)]
CONFIGS: dict[str, dict[str, Any]] = {
    "cat": {"merge_method": "task_arithmetic", "adapter": {}, "parameters": {"weight": 0.5}},
    "svd": {"merge_method": "task_arithmetic", "adapter": {"rank": 3}, "parameters": {"weight": 0.5}},
    "factors": {"merge_method": "ties", "adapter": {"merge": "factors"}, "parameters": {"weight": 1, "density": 0.5}},
    "ties": {"merge_method": "ties", "adapter": {"rank": 3}, "parameters": {"weight": 1, "density": 0.5}},
    "dare": {"merge_method": "dare_ties", "adapter": {"rank": 3}, "parameters": {"weight": 1, "density": 0.5}},
    "knots": {"merge_method": "knots", "adapter": {"rank": 3}},
}


def write_adapters(directory: Path, number: int, rows: int = 24, columns: int = 16, rank: int = 2) -> list[Path]:
    for k in range(number):
        tensors = [draw_factors(name, rows, columns, rank, 10 * k + j) for j, name in enumerate(MODULES)]
        joined = {name: tensor.bfloat16() for each in tensors for name, tensor in each.items()}
        write_adapter(directory / f"adapter{k}", joined, r=rank)
        (directory / f"adapter{k}" / "tokenizer_config.json").write_text("{}")
    return [directory / f"adapter{k}" for k in range(number)]


def with_models(config: dict[str, Any], models: list[str] | list[Path]) -> dict[str, Any]:
    return {**config, "models": [{"model": str(model)} for model in models]}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_bytes(name: str, tmp_path: Path) -> None:
    config = with_models(CONFIGS[name], write_adapters(tmp_path, 3))
    merge(config, tmp_path / "one", workers=1, memory="1GiB", seed=5)
    least = max(task.projected_mem for task in plan(config, workers=1).tasks)
    merge(config, tmp_path / "two", workers=4, memory=least, seed=5)
    assert read_files(tmp_path / "one") == read_files(tmp_path / "two")
    assert (tmp_path / "one" / "tokenizer_config.json").exists()
    verify(tmp_path / "one")


@pytest.mark.parametrize(("density", "rows"), [(0.4, 6), (1.0, 24)])
def test_knots_of_adapters_is_the_papers(density: float, rows: int, tmp_path: Path) -> None:
    """Stoica et al. 2025, section 4: [d_1 ... d_n] = U S [V_1 ... V_n], and TIES merges S V_1 to S V_n.

    Where elements are trimmed, the updates span all rows, so that it is no question how many there are to keep.
    """
    adapters = write_adapters(tmp_path, 3, rows=rows)
    weights = (0.5, 1.0, 0.8)
    entries = [
        {"model": str(path), "parameters": {"weight": weight}} for path, weight in zip(adapters, weights, strict=True)
    ]
    settings = {"density": density, "lambda": 0.7}
    config = {"merge_method": "knots", "dtype": "float32", "adapter": {"rank": rows}, "models": entries}
    merge({**config, "parameters": settings}, tmp_path / "out", workers=1)
    merged = read_updates(tmp_path / "out")
    for module in MODULES:
        deltas = [read_updates(path)[module] for path in adapters]
        left, singular, right = torch.linalg.svd(torch.cat(deltas, 1), full_matrices=False)
        aligned = torch.stack((singular[:, None] * right).split(deltas[0].shape[1], 1))
        least = aligned.abs().flatten(1).sort(descending=True).values[:, int(density * aligned[0].numel()) - 1]
        kept = aligned * (aligned.abs() >= least[:, None, None]) * torch.tensor(weights).double()[:, None, None]
        agrees = (kept != 0) & (kept.sign() == kept.sum(0).sign())
        shares = (agrees * torch.tensor(weights)[:, None, None]).sum(0)
        expected = 0.7 * left @ ((kept * agrees).sum(0) / shares.where(shares > 0, torch.ones_like(shares)))
        torch.testing.assert_close(merged[module], expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def read_updates(adapter: Path) -> dict[str, torch.Tensor]:
    """Return the update of each module by an adapter, in float64."""
    stored = {name: tensor.double() for name, tensor in load_file(adapter / "adapter_model.safetensors").items()}
    config = json.loads((adapter / "adapter_config.json").read_text())
    updates = {}
    for module in MODULES:
        right, left = (stored[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
        rank = config.get("rank_pattern", {}).get(module, config["r"])
        updates[module] = config.get("alpha_pattern", {}).get(module, config["lora_alpha"]) / rank * left @ right
    return updates


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_the_shipped_configs(path: Path, tmp_path: Path) -> None:
    config = yaml.safe_load(path.read_text())
    for entry, model in zip(config["models"], write_adapters(tmp_path, len(config["models"])), strict=True):
        entry["model"] = str(model)
    merge(config, tmp_path / "out")
    verify(tmp_path / "out")


def test_a_hundred_adapters(tmp_path: Path, cli: Cli) -> None:
    config = write_config(tmp_path / "merge.yml", with_models(CONFIGS["svd"], write_adapters(tmp_path, 100)))
    outcome = cli("plan", config)
    assert "task_arithmetic of 100 adapters, to an adapter" in outcome.out
    assert "the adapter changes 3 modules: rank 3 for 3" in outcome.out
    assert cli("merge", config, tmp_path / "out").code == 0
    assert "LoRA adapter" in cli("inspect", tmp_path / "out").out


def test_a_finished_one_is_complete_and_may_be_replaced(tmp_path: Path) -> None:
    models = write_adapters(tmp_path, 2)
    merge(with_models(CONFIGS["cat"], models), tmp_path / "out")
    assert merge(with_models(CONFIGS["cat"], models), tmp_path / "out").was_complete
    with pytest.raises(OutputError, match="--overwrite"):
        merge(with_models(CONFIGS["svd"], models), tmp_path / "out")
    merge(with_models(CONFIGS["svd"], models), tmp_path / "out", overwrite=True)
    verify(tmp_path / "out")


def test_the_plan_for_machines(tmp_path: Path) -> None:
    made = plan(with_models(CONFIGS["svd"], write_adapters(tmp_path, 2)))
    content = json.loads(plan_json(made))
    assert (content["num_tensors"], content["config"]["r"]) == (6, 3)
    table = plan_table(made).to_pydict()
    assert table["name"][:2] == [f"base_model.model.{MODULES[0]}.lora_{part}.weight" for part in "AB"]
    assert (table["shape"][:2], table["nbytes"][:2]) == ([[3, 16], [24, 3]], [96, 144])
    with pytest.raises(MemoryLimitError, match=rf"{MODULES[0]} needs .* --memory"):
        plan(with_models(CONFIGS["svd"], write_adapters(tmp_path / "more", 2)), memory="8MiB")


@pytest.mark.slow
def test_s3_to_s3(bucket: str, s3_server: S3Server, tmp_path: Path, cli: Cli) -> None:
    models = write_adapters(tmp_path, 2)
    merge(with_models(CONFIGS["ties"], models), tmp_path / "out")
    urls = [upload(s3_server, bucket, f"adapters/{model.name}", model) for model in models]
    config = write_config(tmp_path / "merge.yml", with_models(CONFIGS["ties"], urls))
    outcome = cli("merge", config, f"s3://{bucket}/merged")
    assert outcome.code == 0, outcome.err
    found = download(f"s3://{bucket}/merged")
    assert without_own(found) == without_own(read_files(tmp_path / "out"))
    assert cli("verify", f"s3://{bucket}/merged").code == 0


@pytest.mark.slow
def test_hub_to_hub(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    models = write_adapters(tmp_path, 2)
    merge(with_models(CONFIGS["ties"], models), tmp_path / "out")
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for model in models:
            hub.create_repo(f"org/{model.name}")
            hub.upload(f"org/{model.name}", dict(read_files(model)))
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        names = [f"org/{model.name}" for model in models]
        config = write_config(tmp_path / "merge.yml", with_models(CONFIGS["ties"], names))
        outcome = cli("merge", config, "hf://me/merged")
        assert outcome.code == 0, outcome.err
        found = {name: data for name, data in hub.read_files("me/merged").items() if name != ".gitattributes"}
        assert without_own(found) == without_own(read_files(tmp_path / "out"))
        assert "base_model_relation: merge" in found["README.md"].decode()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["svd", "ties"])
def test_no_more_memory_than_planned(name: str, tmp_path: Path) -> None:
    configs = []
    for size, rank in ((32, 2), (1024, 40)):
        models = write_adapters(tmp_path / str(size), 4, size, size, rank)
        configs.append(write_config(tmp_path / f"{size}.yml", with_models(CONFIGS[name], models)))
    command = [sys.executable, "-c", SCRIPT, *map(str, configs), str(tmp_path / "out"), "1GiB"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    assert found["used"] <= found["projected"] + SLACK_NBYTES


def test_a_sweep_of_ranks_and_weights(tmp_path: Path, cli: Cli) -> None:
    models = write_adapters(tmp_path, 2)
    config = write_config(tmp_path / "merge.yml", with_models(CONFIGS["svd"], models))
    outcome = cli("sweep", config, tmp_path / "out", "--set", "adapter.rank=1,3", "--set", "weight=0.5,1.0")
    assert outcome.code == 0, outcome.err
    merge(with_models(CONFIGS["svd"], models), tmp_path / "alone")
    (point,) = (tmp_path / "out").glob("*rank-3*0.5")
    name = "adapter_model.safetensors"
    assert (point / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()
