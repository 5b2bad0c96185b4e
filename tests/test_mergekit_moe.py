"""Mixtures of experts against mergekit-moe 0.1.5, in a process and an environment of its own.

`make test-mergekit` installs it and runs this.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from raymerge import merge
from tests.checkpoints import Tensors, read_tensors
from tests.mixtures import make_config, write_family

PEER = Path(os.environ.get("RAYMERGE_MERGEKIT", ".venv-mergekit/bin/mergekit-multi")).with_name("mergekit-moe")
NAMES = {".block_sparse_moe.": ".mlp.", ".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEER.exists(), reason=f"{PEER} is not there")]


def split_experts(tensors: Tensors) -> Tensors:
    """Return tensors with those of all experts, which mergekit writes as one, apart."""
    found = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".")
        if last not in ("gate_up_proj", "down_proj"):
            found[name] = tensor
            continue
        for number, expert in enumerate(tensor):
            parts = ("gate_proj", "up_proj") if last == "gate_up_proj" else (last,)
            for part, values in zip(parts, expert.chunk(len(parts)), strict=True):
                found[f"{prefix}.{number}.{part}.weight"] = values
    return found


def rename(name: str) -> str:
    for old, new in NAMES.items():
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize(
    ("family", "architecture", "gate_mode", "bound"),
    [
        ("llama", "mixtral", "cheap_embed", 1e-6),
        ("llama", "deepseek", "cheap_embed", 1e-6),
        ("qwen2", "qwen", "cheap_embed", 1e-6),
        ("qwen3", "qwen3", "cheap_embed", 1e-6),
        ("mistral", "mixtral", "hidden", 0.02),  # mergekit computes in bfloat16
    ],
)
def test_every_tensor(tmp_path: Path, family: str, architecture: str, gate_mode: str, bound: float) -> None:
    models = write_family(tmp_path, family, dtype=torch.bfloat16)
    config: dict[str, Any] = make_config(models, gate_mode=gate_mode, architecture=architecture, dtype="float32")
    config["experts"][0] |= {"negative_prompts": ["tell me a story"], "residual_scale": 0.5}
    shared = {"source_model": str(models[1]), "residual_scale": 0.25}
    if architecture == "qwen":
        config["shared_experts"] = [shared | {"positive_prompts": ["about a dragon"]}]
    if architecture == "deepseek":
        config["shared_experts"] = [shared]
    (tmp_path / "config.yml").write_text(yaml.safe_dump(config))
    command = [str(PEER), str(tmp_path / "config.yml"), str(tmp_path / "peer")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    subprocess.run([*command, "--i-understand-this-is-not-useful-without-training"], check=True, env=environment)
    merge(config, tmp_path / "out")
    expected = split_experts(read_tensors(tmp_path / "peer"))
    found = {rename(name): tensor for name, tensor in read_tensors(tmp_path / "out").items()}
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        limit = bound if name.endswith(("gate.weight", "shared_expert_gate.weight")) else 0
        assert (tensor - expected[name]).abs().max() <= limit, name
