from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from raymerge import plan
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.plan import report
from raymerge.pipeline.plan.report import format_plan, plan_json, plan_table, save_table
from raymerge.pipeline.plan.types import MergePlan
from tests.checkpoints import llama_config, llama_tensors, write_checkpoint, write_llama, write_sparse

HIDDEN, VOCAB = 512, 33_000
"""The embedding is larger than an input buffer can be."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    directory = tmp_path_factory.mktemp("models")
    shapes = {name: tuple(x.shape) for name, x in llama_tensors(num_layers=1, hidden=HIDDEN).items()}
    shapes |= dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), (VOCAB, HIDDEN))
    config = llama_config(1, vocab_size=VOCAB)
    models = tuple(write_sparse(directory / name, shapes, config) for name in ("base", "a", "b"))
    (models[0] / "tokenizer_config.json").write_text("{}")
    return models


@pytest.fixture(scope="module")
def ties(models: tuple[Path, ...]) -> MergePlan:
    base, *tuned = map(str, models)
    config = {
        "merge_method": "ties",
        "base_model": base,
        "models": [{"model": model, "parameters": {"weight": 1, "density": 0.5}} for model in tuned],
    }
    return plan(config, shard_size="30MB", memory="100MB", workers=2)


def test_a_plan_for_people(ties: MergePlan, models: tuple[Path, ...]) -> None:
    text = format_plan(ties)
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert text.startswith(f"ties of 3 models, {models[0]} gives config.json")
    assert lines["tensors"].split() == ["tensors", "12"]
    embedding = 2 * VOCAB * HIDDEN * 2 * 3
    rest = sum(merge.nbytes for task in ties.tasks for merge in task.merges) * 3
    assert lines["read"].split()[1:3] == [f"{rest / 1e6:.0f}", "MB,"]
    assert f"and {2 * embedding / 1e6:.0f} MB again" in lines["read"]
    assert "in 3 shards, the largest 33.8 MB" in lines["write"]
    assert "96MiB are allowed" in lines["memory"]
    assert "2 to measure" in lines["passes"]


def test_a_plan_for_gpus(models: tuple[Path, ...]) -> None:
    config = {"merge_method": "linear", "models": [{"model": str(m), "parameters": {"weight": 1}} for m in models]}
    result = plan(config, workers=2, shard_size="30MB", gpu_memory="4GiB")
    text = format_plan(result)
    line = next(line for line in text.splitlines() if line.startswith("  gpus "))
    assert line.startswith("  gpus     1, ")
    assert any(line.startswith("  advice: this would be faster without --gpu-memory") for line in text.splitlines())
    assert line.endswith("MiB for each of 2 workers on one, at most, and 640MiB for CUDA; 4096MiB of each are allowed")
    found = json.loads(plan_json(result))
    assert (found["num_gpus"], found["allowed_gpu_mem"]) == (1, 2**32)
    assert all(0 < shard["projected_gpu_mem"] <= 2**31 for shard in found["shards"])


def test_a_verbose_plan_lists_the_shards(ties: MergePlan) -> None:
    brief, verbose = format_plan(ties).splitlines(), format_plan(ties, verbose=True).splitlines()
    extra = [line for line in verbose if line not in brief]
    assert [line.split(":")[0].strip() for line in extra] == [task.file for task in ties.tasks]


def test_a_plan_for_machines(ties: MergePlan) -> None:
    found = json.loads(plan_json(ties))
    assert found["num_tensors"] == sum(shard["num_tensors"] for shard in found["shards"]) == 12
    assert found["read_nbytes"] == sum(shard["read_nbytes"] for shard in found["shards"])
    assert found["write_nbytes"] == sum(shard["nbytes"] for shard in found["shards"])
    assert found["num_workers"] * max(s["projected_mem"] for s in found["shards"]) <= found["allowed_mem"] == 10**8
    assert found["fingerprint"] == ties.fingerprint
    assert found["config"]["vocab_size"] == VOCAB
    assert found["side_files"] == ["tokenizer_config.json"]


def test_the_table_has_a_row_for_each_tensor(ties: MergePlan, models: tuple[Path, ...], tmp_path: Path) -> None:
    save_table(ties, tmp_path / "plan.parquet")
    rows: list[dict[str, Any]] = pq.read_table(tmp_path / "plan.parquet").to_pylist()
    assert {row["name"]: row["file"] for row in rows} == ties.weight_map
    row = next(row for row in rows if row["name"] == "model.norm.weight")
    assert (row["dtype"], row["shape"], row["nbytes"], row["op"]) == ("BF16", [HIDDEN], 2 * HIDDEN, "ties")
    assert json.loads(row["parameters"])["weight"] == [1.0, 1.0]
    assert [source["model"] for source in row["sources"]] == [str(model) for model in models]
    for source in row["sources"]:
        assert source["stop"] - source["start"] == 2 * HIDDEN
        assert Path(source["url"]).is_file()


def test_a_table_of_scalars_and_copies(tmp_path: Path) -> None:
    tensors = {"scale": torch.tensor(2.0), "ids": torch.arange(3), "empty": torch.zeros(0, 4)}
    model = write_checkpoint(tmp_path / "a", tensors, {})
    the_plan = plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    save_table(the_plan, tmp_path / "plan.parquet")
    rows = {row["name"]: row for row in pq.read_table(tmp_path / "plan.parquet").to_pylist()}
    assert {name: (row["shape"], row["op"]) for name, row in rows.items()} == {
        "scale": ([], "passthrough"),
        "ids": ([3], "copy"),
        "empty": ([0, 4], "passthrough"),
    }


def test_a_table_of_scalars_alone(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "a", {"scale": torch.tensor(2.0)}, {})
    the_plan = plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    assert plan_table(the_plan).schema.field("shape").type.value_type == "int64"


def test_a_table_that_cannot_be_written(ties: MergePlan, tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write"):
        save_table(ties, tmp_path / "missing" / "plan.parquet")


def test_what_is_left_out_is_printed(tmp_path: Path) -> None:
    tensors = llama_tensors() | {"model.rotary_emb.inv_freq": torch.ones(4)}
    model = write_checkpoint(tmp_path / "a", tensors, llama_config())
    the_plan = plan({"merge_method": "passthrough", "models": [{"model": str(model)}]})
    (line,) = [line for line in format_plan(the_plan).splitlines() if "not in the output" in line]
    assert "model.rotary_emb.inv_freq" in line
    assert "compute when they are loaded" in line
    assert json.loads(plan_json(the_plan))["dropped"] == list(the_plan.dropped)


def test_advice_is_printed_and_decides_nothing(tmp_path: Path) -> None:
    model = write_sparse(tmp_path / "a", {f"layers.{k}.weight": (10_000, 5_000) for k in range(60)}, {})
    config = {"merge_method": "passthrough", "models": [{"model": str(model)}]}
    one, many = (plan(config, shard_size="2GB", workers=workers, memory="8GiB") for workers in (1, 8))
    assert one.advice == ()
    (line,) = [line for line in format_plan(many).splitlines() if line.startswith("  advice: ")]
    assert line.endswith(
        "8 workers would be idle 63% of the time with 3 shards; --shard-size 200MB would take 60% less time"
    )
    assert json.loads(plan_json(many))["advice"] == list(many.advice)
    assert (one.fingerprint, one.warnings) == (many.fingerprint, many.warnings)
    assert plan(config, shard_size="200MB", workers=8, memory="8GiB").advice == ()
    assert plan(config, shard_size="2GB", workers=8, memory="42MiB").advice == (), "the memory allows no more workers"


def test_json_has_no_infinity_where_config_json_has_one(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", time_step_limit=[0.0, float("inf"), float("nan")])
    text = plan_json(plan({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    found = json.loads(text, parse_constant=pytest.fail)
    assert found["config"]["time_step_limit"] == [0.0, {"__float__": "Infinity"}, {"__float__": "NaN"}]


def test_json_stays_json_where_a_secret_is_none(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", use_auth_token=True, api_key=None, token={"access_token": "S3cr3tS3cr3t"})
    text = plan_json(plan({"merge_method": "passthrough", "models": [{"model": str(model)}]}))
    config = json.loads(text)["config"]
    assert (config["use_auth_token"], config["api_key"], config["token"]) == (True, None, {"access_token": "***"})


def test_a_plan_says_what_it_takes_itself(ties: MergePlan, monkeypatch: pytest.MonkeyPatch) -> None:
    own = 650 * 3 * 12 + 1900 * 12  # three models of 12 tensors
    assert json.loads(plan_json(ties))["plan_mem"] == own
    assert "the plan takes" not in format_plan(ties)
    monkeypatch.setattr(report, "NOTABLE_NBYTES", own)
    assert "96MiB are allowed in all; the plan takes 1MiB besides" in format_plan(ties)
