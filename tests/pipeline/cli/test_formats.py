"""The output of `raymerge inspect`: text for people, and JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from raymerge import merge
from raymerge.pipeline.checkpoint.inspection.inspect import inspect
from raymerge.pipeline.cli.formats import format_inspection, inspection_json
from tests.checkpoints import write_checkpoint, write_llama
from tests.commands import Cli


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return write_llama(tmp_path / "model", num_layers=3, dtype=torch.bfloat16, num_shards=3)


def test_names_cannot_command_the_terminal(tmp_path: Path, cli: Cli) -> None:
    tensors = {"a\x1b[31m": torch.ones(1), "h.0.b\n": torch.ones(1)}
    write_checkpoint(tmp_path / "m", tensors, {"architectures": ["X\x1b[2J"], "model_type": 5})
    outcome = cli("inspect", tmp_path / "m", "--tensors")
    assert "\x1b" not in outcome.out
    assert "'a\\x1b[31m'" in outcome.out


def test_tensors(sharded: Path, cli: Cli) -> None:
    found = inspect(sharded)
    outcome = cli("inspect", sharded, "--tensors")
    for tensor in found.tensors:
        line = f"    {tensor.name}  BF16  {list(tensor.shape)}  "
        assert any(
            text.startswith(line) and text.endswith(f"  {tensor.file.url} {tensor.start}-{tensor.stop}")
            for text in outcome.out.splitlines()
        )
    assert "start" not in cli("inspect", sharded).out


TOP = {
    "url", "weights_format", "architectures", "model_type", "config_num_layers", "obstacle", "num_files", "nbytes",
    "num_tensors", "num_parameters", "tensor_nbytes", "dtypes", "stacks", "outside", "embedding", "head", "is_tied",
    "made", "files", "tensors", "read_nbytes", "num_reads",
}  # fmt: skip
TOTALS = {"num_tensors", "num_parameters", "tensor_nbytes"}


def test_json(tmp_path: Path, cli: Cli) -> None:
    """The keys are a promise to whoever reads them: new ones may come, none may go."""
    models = [{"model": str(write_llama(tmp_path / f"m{k}", k))} for k in range(2)]
    out = tmp_path / "out"
    merge({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, out, shard_size=5000)
    outcome = cli("inspect", out, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    value = json.loads(outcome.out)
    found = inspect(out)
    assert outcome.out == inspection_json(found) + "\n"
    assert value.keys() == TOP
    assert value["made"].keys() == {"version", "method", "models"}
    assert value["made"]["models"] == [model["model"] for model in models]
    assert {key for total in value["dtypes"].values() for key in total} == TOTALS
    (stack,) = value["stacks"]
    assert stack.keys() == {"prefix", "num_layers", "kinds"} | TOTALS
    assert stack["kinds"] == [
        {"layers": [[0, 2]], "each": {"num_tensors": 9, "num_parameters": 2592, "tensor_nbytes": 10368}}
    ]
    assert {key for file in value["files"] for key in file} == {"name", "nbytes", "role"}
    assert len(value["tensors"]) == value["num_tensors"] == 21
    for tensor in value["tensors"]:
        assert tensor.keys() == {"name", "dtype", "shape", "nbytes", "file", "start", "stop"}
        assert (out / tensor["file"]).stat().st_size >= tensor["stop"] == tensor["start"] + tensor["nbytes"]
    assert value["nbytes"] == sum(file["nbytes"] for file in value["files"])


def test_lines_are_of_a_width_for_people(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", num_shards=3)
    for k in range(30):
        (model / f"extra_{k}.json").write_text("{}")
    text = format_inspection(inspect(model))
    lines = [line for line in text.splitlines() if str(tmp_path) not in line]
    assert max(map(len, lines)) <= 100
    assert "and 13 more" in " ".join(text.split())
    assert lines[-1].startswith("read ")


def test_no_credential_is_shown(tmp_path: Path, cli: Cli) -> None:
    model = write_llama(tmp_path / "hf_abcdefgh12345678")
    (model / "raymerge_manifest.json").write_text('{"models": [{"model": "https://h/a?sig=abcdef"}]}')
    for arguments in ([], ["--json"], ["--tensors"]):
        outcome = cli("inspect", model, *arguments)
        assert "sig=***" in outcome.out
        assert "abcdef" not in outcome.out
