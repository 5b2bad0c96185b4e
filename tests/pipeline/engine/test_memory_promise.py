"""What a plan says a merge takes, against what it takes: one fresh process for each op."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from raymerge.ops.registry import Base, Op, load_ops
from tests.checkpoints import write_config
from tests.memory_promise import NUM_ELEMENTS, SCRIPT, SLACK_NBYTES, write_models

MEMORY = "32MiB"
VALUES = {"weight": 1.0, "density": 0.5, "t": 0.5}


def make_config(op: Op, models: list[str]) -> dict[str, Any]:
    """Return a merge of as many models as the op takes, with every parameter that it requires."""
    base, *others = models
    if op.base is Base.INPUT:
        others = models
    parameters = {p.name: VALUES[p.name] for p in op.parameters if p.default is None or p.name == "density"}
    return {
        "merge_method": op.name,
        **({"base_model": base} if op.base is Base.REQUIRED else {}),
        "models": [{"model": model} for model in others[: op.max_models]],
        "parameters": parameters,
    }


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    directory = tmp_path_factory.mktemp("models")
    return {"tiny": write_models(directory / "tiny", 100), "large": write_models(directory / "large", NUM_ELEMENTS)}


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
@pytest.mark.parametrize("name", load_ops())
def test_peak_memory_is_as_projected(name: str, models: dict[str, list[str]], tmp_path: Path) -> None:
    op = load_ops()[name]
    configs = [write_config(tmp_path / f"{kind}.yml", make_config(op, models[kind])) for kind in ("tiny", "large")]
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT, *map(str, configs), str(tmp_path), MEMORY], capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    assert (figures["num_workers"], figures["num_shards"]) == (1, 2)
    assert figures["projected"] <= figures["allowed"]
    assert figures["projected"] // 2 <= figures["used"] <= figures["projected"] + SLACK_NBYTES
