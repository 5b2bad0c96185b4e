"""The memory that sweeps take against what their plans say: one fresh process for each."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.checkpoints import write_config
from tests.memory_promise import NUM_ELEMENTS, SLACK_NBYTES, write_models

# The tiny sweep runs first, so that the large one finds code paged in and the threads' stacks touched.
SCRIPT = """
import json, sys
from pathlib import Path
from raymerge import Planned, sweep

def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

plans = []

def keep(event):
    if isinstance(event, Planned):
        plans.append(event.plan)

tiny, large, out, memory, values = sys.argv[1:]
sweep(Path(tiny), f"{out}/tiny", [values], memory=memory, workers=1)
before = resident("VmRSS")
report = sweep(Path(large), f"{out}/large", [values], memory=memory, workers=1, shard_size="16MiB", on_event=keep)
peak = resident("VmHWM")
print(json.dumps({
    "used": peak - before,
    "projected": max(plan.num_workers * task.projected_mem for plan in plans for task in plan.tasks),
    "allowed": plans[0].allowed_mem,
    "batches": [len(plan.outputs) for plan in plans],
    "measured": max(each.peak_measured_mem for each in report.reports),
}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux to know what is resident now")
@pytest.mark.parametrize(
    ("method", "values", "memory", "batches"),
    [
        ("linear", "weight[1]=0.1:0.6:0.1", "96MiB", [6]),
        ("linear", "weight[1]=0.1:0.6:0.1", "48MiB", [3, 3]),
        ("linear", "weight[1]=0.02:0.5:0.02", "256MiB", [25]),
        ("ties", "density=0.1:0.6:0.1", "160MiB", [6]),
        ("breadcrumbs_ties", "density=0.05:0.5:0.05", "256MiB", [10]),
    ],
)
def test_peak_memory_of_a_sweep_is_as_projected(
    method: str, values: str, memory: str, batches: list[int], tmp_path: Path
) -> None:
    configs = []
    for kind, num_elements in (("tiny", 100), ("large", NUM_ELEMENTS)):
        base, *tunes = write_models(tmp_path / kind, num_elements)
        config = {
            "merge_method": method,
            **({} if method == "linear" else {"base_model": base}),
            "models": [{"model": model} for model in tunes],
            "parameters": {"weight": 1.0} | ({} if method == "linear" else {"density": 0.5}),
        }
        configs.append(str(write_config(tmp_path / f"{kind}.yml", config)))
    command = [sys.executable, "-c", SCRIPT, *configs, str(tmp_path), memory, values]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    figures = json.loads(process.stdout)
    assert figures["batches"] == batches
    assert figures["projected"] <= figures["allowed"]
    assert figures["measured"] <= figures["projected"] + SLACK_NBYTES
    assert figures["projected"] // 2 - SLACK_NBYTES <= figures["used"] <= figures["projected"] + SLACK_NBYTES
