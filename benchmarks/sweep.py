"""Processor time of a sweep, beside as many single merges, and beside writing and hashing its outputs."""

from __future__ import annotations

import sys
from pathlib import Path

from merges import SLERP, TIES, Bench, Merge, weights
from processes import Usage, measure, median
from report import Row, gib
from speed import FAMILY

MAX_SHARE = 0.35
"""Largest share of the processor time of single merges."""
SWEEPS: dict[str, tuple[Merge, str]] = {
    "9 x slerp, 2 models": (SLERP, "t=0.1:0.9:0.1"),
    "9 x linear, 2 models": (Merge("linear", weights=(0.5, 0.5)), "weight[1]=0.1:0.9:0.1"),
    "10 x ties, 3 and a base": (TIES, "density=0.1:1.0:0.1"),
}
_FLOOR = """
import hashlib, os, sys
out, piece, *files = sys.argv[1:]
data = open(files[0], "rb").read(int(piece))
for number, file in enumerate(files):
    left, digest = os.path.getsize(file), hashlib.sha256()
    with open(f"{out}/{number}", "wb", buffering=0) as copy:
        while left > 0:
            digest.update(data)
            copy.write(data)
            left -= len(data)
        os.fsync(copy.fileno())
"""


def measure_sweep(bench: Bench) -> list[Row]:
    """Return the processor time of sweeps, of that of as many merges: the machine may be busy with something else."""
    return [_measure(bench, name, merge, values) for name, (merge, values) in SWEEPS.items()]


def _measure(bench: Bench, name: str, merge: Merge, values: str) -> Row:
    config, num_models = bench.write_config(merge, FAMILY), int(name.partition(" ")[0])
    inputs = merge.inputs(bench.checkpoints, FAMILY)
    out, log = bench.raymerge_out, bench.workdir / "sweep.log"
    runs: dict[str, list[Usage]] = {"sweep": [], "merge": [], "floor": []}
    for _ in range(bench.repeats):
        bench.warm(inputs)
        runs["merge"].append(bench.run_raymerge(config))
        bench.clear(out)
        bench.warm(inputs)
        command: list[str | Path] = [bench.raymerge, "sweep", config, out, "--set", values, "-q"]
        runs["sweep"].append(measure(command, log=log))
        made = weights(sorted(path for path in out.iterdir() if path.is_dir()))
        runs["floor"].append(_run_floor(bench, made))
        bench.clear(out)
    sweep, single, floor = (median(usages, lambda usage: usage.cpu) for usages in runs.values())
    share = sweep / (num_models * single)
    wall = median(runs["sweep"], lambda usage: usage.wall)
    peak = gib(median(runs["sweep"], lambda usage: usage.peak_rss))
    return Row(
        f"processor time, sweep : merges, {name}",
        f"at most {MAX_SHARE}",
        f"{share:.2f}",
        share <= MAX_SHARE,
        f"sweep {sweep:.1f} s CPU ({wall:.1f} s wall, {peak} peak), a merge {single:.1f} s; writing and hashing the"
        f" outputs {floor:.1f} s; medians of {bench.repeats}",
        {who: [usage.to_json() for usage in usages] for who, usages in runs.items()},
    )


def _run_floor(bench: Bench, made: list[Path]) -> Usage:
    """Write as many bytes as the models have, and take the sha256 of each."""
    out = bench.workdir / "out-floor"
    bench.clear(out)
    out.mkdir()
    usage = measure([sys.executable, "-c", _FLOOR, out, str(2**22), *made], log=bench.workdir / "floor.log")
    bench.clear(out)
    return usage
