"""The plans of the largest merges: time and memory of the driver, and what every task is sent; the largest headers.

`python benchmarks/planning.py CONFIG` plans a merge and prints how many tensors and tasks there are, and how large the
largest task is, as JSON. Without CONFIG, it prints the CPU seconds that reading a large header takes.
"""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from merges import Bench, Merge
from processes import measure, median
from report import Row

MAX_SECONDS = 30
MAX_DRIVER_NBYTES = 2 * 10**9
MAX_TASK_NBYTES = 10**6
NUM_HEADER_TENSORS, MAX_HEADER_SECONDS = 20_000, 2


@dataclass(frozen=True)
class PlanSizes:
    """How large a plan is."""

    num_tensors: int
    """Of the output."""
    num_tasks: int
    task_nbytes: int
    """The largest task, pickled."""


def measure_large_plans(bench: Bench) -> list[Row]:
    """Return the cost of the plans of 16 models of 405 B parameters, and of three of 671 B in 92,000 tensors each."""
    return [
        _measure_plan(bench, "Llama-3.1-405B", "llama-405b", num_models=16),
        _measure_plan(bench, "DeepSeek-V3", "deepseek-v3", num_models=3),
    ]


def measure_headers(bench: Bench) -> list[Row]:
    """Return the CPU seconds of reading the header of a file with very many tensors."""
    command = [sys.executable, __file__]
    seconds = sorted(
        float(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(bench.repeats)
    )
    taken = seconds[len(seconds) // 2]
    return [
        Row(
            f"header of {NUM_HEADER_TENSORS:,} tensors",
            f"at most {MAX_HEADER_SECONDS} s of CPU to read",
            f"{taken:.2f} s",
            taken <= MAX_HEADER_SECONDS,
            f"median of {len(seconds)}, experts of 64 × 8",
            {"raymerge": seconds},
        )
    ]


def _measure_plan(bench: Bench, title: str, family: str, *, num_models: int) -> Row:
    merge = Merge("ties", weights=(1.0,) * (num_models - 1), densities=(0.5,) * (num_models - 1), has_base=True)
    config = bench.write_config(merge, family)
    log = bench.workdir / "plan.log"
    usages = [measure([bench.raymerge, "plan", config], log=log) for _ in range(bench.repeats)]
    sizes = _count(config)
    wall = median(usages, lambda usage: usage.wall)
    peak = max(usage.peak_rss for usage in usages)
    return Row(
        f"raymerge plan, {title} × {num_models}",
        "at most 30 s, 2 GB of driver memory, 1 MB for each task",
        f"{wall:.1f} s, {peak / 1e9:.2f} GB, {sizes.task_nbytes / 1e6:.2f} MB",
        wall <= MAX_SECONDS and peak <= MAX_DRIVER_NBYTES and sizes.task_nbytes <= MAX_TASK_NBYTES,
        f"ties, {sizes.num_tensors:,} tensors in {sizes.num_tasks:,} tasks;"
        f" median wall ({median(usages, lambda usage: usage.cpu):.1f} s CPU) and largest ru_maxrss of {len(usages)}",
        {"raymerge": [usage.to_json() for usage in usages], "plan": asdict(sizes)},
    )


def _count(config: Path) -> PlanSizes:
    """Plan in a process of its own: this one has to stay small."""
    done = subprocess.run([sys.executable, __file__, config], capture_output=True, text=True, check=True)
    return PlanSizes(**json.loads(done.stdout))


def _plan(config: Path) -> PlanSizes:
    from raymerge import plan

    tasks = plan(config).tasks
    return PlanSizes(
        num_tensors=sum(len(task.merges) for task in tasks),
        num_tasks=len(tasks),
        task_nbytes=max(len(pickle.dumps(task, pickle.HIGHEST_PROTOCOL)) for task in tasks),
    )


def _read_header() -> float:
    from raymerge.pipeline.checkpoint.header import make_header, parse_header
    from raymerge.pipeline.stores.files import StoredFile

    names = (f"model.layers.{k // 9}.mlp.experts.{k % 256}.w{k}.weight" for k in range(NUM_HEADER_TENSORS))
    header = make_header([(name, "BF16", (64, 8), 1024) for name in names])
    file = StoredFile("x", len(header) + NUM_HEADER_TENSORS * 1024, "")
    begin = time.process_time()
    parse_header(header, file)
    return time.process_time() - begin


if __name__ == "__main__":
    print(json.dumps(asdict(_plan(Path(sys.argv[1]))) if len(sys.argv) > 1 else _read_header()))
