"""What a plan says a merge takes, against what it takes: one fresh process for each op."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.ops.registry import Base, Op, load_ops
from tests.checkpoints import write_checkpoint, write_config

SLACK_NBYTES = 8 * 2**20
"""What no plan counts: stacks and allocator arenas of the threads, code that is paged in for the first time, and the
room between the chunks of the allocator."""

MEMORY = "32MiB"
NUM_ELEMENTS = 2**23
"""Of each of two tensors: 16 MiB as stored, 32 MiB in the compute dtype; one copy too many of either is seen."""
VALUES = {"weight": 1.0, "density": 0.5, "t": 0.5}

# The tiny merge runs first, so that the large one finds the op's code paged in and the threads' stacks touched.
SCRIPT = """
import json, sys
from pathlib import Path
from raymerge import Listener, merge

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

class Keep(Listener):
    def planned(self, plan):
        self.plan = plan

tiny, large, out, memory = sys.argv[1:]
merge(Path(tiny), f"{out}/tiny", memory=memory, workers=1)
before = resident("VmRSS")
keep = Keep()
merge(Path(large), f"{out}/large", memory=memory, workers=1, shard_size="16MiB", listener=keep)
peak = resident("VmHWM")  # ru_maxrss would begin with what the parent had when it started this process
tasks = keep.plan.tasks
print(json.dumps({
    "used": peak - before,
    "projected": keep.plan.num_workers * max(task.projected_mem for task in tasks),
    "allowed": keep.plan.allowed_mem,
    "num_workers": keep.plan.num_workers,
    "num_shards": len(tasks),
}))
"""


def write_models(directory: Path, num_elements: int) -> list[str]:
    """Write a base and two fine-tunes of two tensors each."""
    generator = torch.Generator().manual_seed(0)
    models = []
    for name in ("base", "a", "b"):
        tensors = {f"w{k}": torch.rand(num_elements, generator=generator).to(torch.bfloat16) for k in range(2)}
        models.append(str(write_checkpoint(directory / name, tensors, {})))
    return models


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
