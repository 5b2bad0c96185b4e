"""How fast GPUs merge, against the processors of the same machine."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from merges import DARE_TIES, LINEAR, SLERP, TIES, Bench, Merge, weights
from processes import Usage, median
from report import Row
from speed import FAMILY

GPU_MEMORY = "16GiB"


def measure_gpu(bench: Bench) -> list[Row]:
    """Return a row for each merge; one that says so where there is no GPU."""
    ask = "import torch; print(torch.cuda.device_count())"  # in a process of its own: this one has to stay small
    count = int(subprocess.run([sys.executable, "-c", ask], check=True, capture_output=True, text=True).stdout)
    if not count:
        return [Row("merges on GPUs", "", "torch sees no GPU here", None, "")]
    return [_measure(bench, merge, count) for merge in (LINEAR, SLERP, TIES, DARE_TIES)]


def _measure(bench: Bench, merge: Merge, num_gpus: int) -> Row:
    config = bench.write_config(merge, FAMILY)
    inputs = merge.inputs(bench.checkpoints, FAMILY)
    nbytes = sum(file.stat().st_size for file in [*weights(inputs), *weights(inputs[:1])])
    runs: dict[str, list[Usage]] = {"cpu": [], "gpu": []}
    for _ in range(bench.repeats):
        for where, options in (("cpu", ()), ("gpu", ("--gpu-memory", GPU_MEMORY))):
            bench.warm(inputs)
            runs[where].append(bench.run_raymerge(config, *options))
            bench.clear(bench.raymerge_out)
    return Row(
        f"{merge.method} of {len(inputs)} on {num_gpus} GPUs, read and written",
        "",
        f"{_speed(nbytes, runs['gpu']):.2f} GB/s",
        None,
        f"{_speed(nbytes, runs['cpu']):.2f} GB/s on the CPU; start of CUDA and torch included",
        {where: [usage.to_json() for usage in usages] for where, usages in runs.items()},
    )


def _speed(nbytes: int, usages: Sequence[Usage]) -> float:
    return nbytes / median(usages, lambda usage: usage.wall) / 1e9
