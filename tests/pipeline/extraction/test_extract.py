"""Adapters that are extracted from a fine-tune: with its base they give the fine-tune back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import RaymergeError, merge
from raymerge.pipeline.errors import CheckpointError, ConfigError, OutputError, TensorMismatchError
from raymerge.pipeline.extraction.extract import Extracted, extract_lora
from raymerge.testing import read_model, write_model
from tests.checkpoints import read_files
from tests.commands import run_command
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.stored_models import download, upload

torch.manual_seed(1)
BASE = {
    "model.embed_tokens.weight": torch.randn(13, 8),
    "model.layers.0.q_proj.weight": torch.randn(20, 8),
    "model.layers.0.q_proj.bias": torch.randn(20),
    "model.layers.0.k_proj.weight": torch.randn(6, 8),
    "model.layers.0.norm.weight": torch.randn(8),
    "model.layers.0.norm.bias": torch.randn(8),
    "model.layers.0.experts.down": torch.randn(2, 4, 8),
    "lm_head.weight": torch.randn(13, 8),
}


def tune() -> dict[str, torch.Tensor]:
    """Return a fine-tune whose layers differ by matrices of rank 2, and some other tensors in full."""
    tuned = {name: tensor.clone() for name, tensor in BASE.items()}
    tuned["model.layers.0.q_proj.weight"] += torch.randn(20, 2) @ torch.randn(2, 8)
    for name in (
        "lm_head.weight",
        "model.layers.0.q_proj.bias",
        "model.layers.0.norm.weight",
        "model.layers.0.experts.down",
    ):
        tuned[name] += torch.randn_like(tuned[name])
    return tuned


def test_the_fine_tune_comes_back(tmp_path: Path) -> None:
    expected = tune()
    base, tuned = write_model(tmp_path / "base", BASE), write_model(tmp_path / "tuned", expected)
    told: list[Extracted] = []
    result = extract_lora(tuned, base, tmp_path / "adapter", rank=2, on_tensor=told.append)
    assert (tuple(told), result.num_unchanged) == (result.tensors, 3)
    assert {item.name: item.rank for item in result.tensors if item.rank} == {"model.layers.0.q_proj.weight": 2}
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["lm_head", "model.layers.0.experts", "model.layers.0.norm"]
    merge({"merge_method": "passthrough", "models": [{"model": f"{base}+{tmp_path}/adapter"}]}, tmp_path / "out")
    for name, values in read_model(tmp_path / "out").items():
        torch.testing.assert_close(values, expected[name], rtol=1e-5, atol=1e-5)
    with pytest.raises(OutputError, match=r"adapter_model\.safetensors is there already"):
        extract_lora(tuned, base, tmp_path / "adapter")


def test_ranks_differ_where_the_share_of_squares_decides(tmp_path: Path) -> None:
    tuned = {name: tensor.clone() for name, tensor in BASE.items()}
    tuned["model.layers.0.q_proj.weight"] += torch.randn(20, 1) @ torch.randn(1, 8)
    tuned["model.layers.0.k_proj.weight"] += torch.linalg.qr(torch.randn(8, 6))[0].T
    paths = write_model(tmp_path / "tuned", tuned), write_model(tmp_path / "base", BASE)
    result = extract_lora(*paths, tmp_path / "adapter", energy=0.6, dtype="bfloat16")
    assert sorted(item.rank for item in result.tensors) == [1, 4]
    merge({"merge_method": "passthrough", "models": [{"model": f"{paths[1]}+{tmp_path}/adapter"}]}, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for item in result.tensors:
        error = (merged[item.name] - tuned[item.name]).norm() / (tuned[item.name] - BASE[item.name]).norm()
        assert float(error) == pytest.approx(item.error, abs=0.01)


def test_embeddings_and_what_is_left_out(tmp_path: Path) -> None:
    tuned = tune()
    tuned["model.embed_tokens.weight"] += torch.randn(13, 1) @ torch.randn(1, 8)
    paths = write_model(tmp_path / "tuned", tuned), write_model(tmp_path / "base", BASE)
    result = extract_lora(*paths, tmp_path / "a", with_embeddings=True, exclude=["norm", "q_proj"])
    assert {item.name: item.rank > 0 for item in result.tensors} == {
        "lm_head.weight": True,
        "model.embed_tokens.weight": True,
        "model.layers.0.experts.down": False,
    }
    merge({"merge_method": "passthrough", "models": [{"model": f"{paths[1]}+{tmp_path}/a"}]}, tmp_path / "out")
    merged = read_model(tmp_path / "out")
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        torch.testing.assert_close(merged[name], tuned[name], rtol=1e-5, atol=1e-5)
    assert torch.equal(merged["model.layers.0.norm.weight"], BASE["model.layers.0.norm.weight"])


@pytest.mark.parametrize(
    ("change", "arguments", "error", "message"),
    [
        ({}, {}, CheckpointError, "nothing to extract"),
        ({"more": torch.ones(1)}, {}, TensorMismatchError, "more in .*tuned, but not in .*base"),
        ({"model.layers.0.k_proj.weight": torch.ones(6, 9)}, {}, TensorMismatchError, r"\[6, 9\] .* \[6, 8\]"),
        (
            {"model.layers.0.k_proj.weight": torch.full((6, 8), torch.nan)},
            {},
            CheckpointError,
            r"k_proj\.weight holds NaN .* in .*tuned or .*base.* --exclude",
        ),
        ({}, {"rank": 0}, ConfigError, "--rank is 0; it must be 1"),
        ({}, {"energy": 1.5}, ConfigError, "a share above 0"),
        ({}, {"dtype": "float64"}, ConfigError, "float32, bfloat16 or float16"),
        ({}, {"exclude": ["("]}, ConfigError, r"--exclude '\('"),
    ],
)
def test_what_cannot_be_extracted(
    change: dict[str, torch.Tensor],
    arguments: dict[str, Any],
    error: type[RaymergeError],
    message: str,
    tmp_path: Path,
) -> None:
    paths = write_model(tmp_path / "tuned", {**BASE, **change}), write_model(tmp_path / "base", BASE)
    with pytest.raises(error, match=message):
        extract_lora(*paths, tmp_path / "adapter", **arguments)
    assert not (tmp_path / "adapter").exists()


def test_the_command_says_how_near_it_comes(tmp_path: Path) -> None:
    write_model(tmp_path / "base", BASE)
    write_model(tmp_path / "tuned", tune())
    command = ["extract-lora", str(tmp_path / "tuned"), str(tmp_path / "base"), str(tmp_path / "a"), "--rank", "1"]
    done = run_command(*command)
    assert "model.layers.0.q_proj.weight: rank 1, error " in done.err
    assert "factors for 1 tensor, the largest error" in done.out


def upload_models(tmp_path: Path, put: Callable[[str, Path], str]) -> tuple[str, str, dict[str, bytes]]:
    """Return where a fine-tune and its base are uploaded to, and the files of the adapter that is extracted here."""
    base, tuned = write_model(tmp_path / "base", BASE), write_model(tmp_path / "tuned", tune())
    extract_lora(tuned, base, tmp_path / "here", rank=2)
    return put("tuned", tmp_path / "tuned"), put("base", tmp_path / "base"), dict(read_files(tmp_path / "here"))


@pytest.mark.slow
def test_s3_to_s3(bucket: str, s3_server: S3Server, tmp_path: Path) -> None:
    tuned, base, expected = upload_models(tmp_path, lambda name, path: upload(s3_server, bucket, name, path))
    out = f"s3://{bucket}/adapter"
    extract_lora(tuned, base, out, rank=2)
    found = download(out)
    assert found.keys() == expected.keys()
    assert found["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
    with pytest.raises(OutputError, match="is there already"):
        extract_lora(tuned, base, out, rank=2)


@pytest.mark.slow
def test_hub_to_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)

        def put(name: str, path: Path) -> str:
            hub.create_repo(f"org/{name}")
            hub.upload(f"org/{name}", dict(read_files(path)))
            return f"org/{name}"

        tuned, base, expected = upload_models(tmp_path, put)
        extract_lora(tuned, base, "hf://me/adapter", rank=2)
        found = hub.read_files("me/adapter")
        assert found["adapter_model.safetensors"] == expected["adapter_model.safetensors"]
        assert json.loads(found["adapter_config.json"])["base_model_name_or_path"] == "org/base"
        assert hub.leaked_tokens == []
