"""What happens before a tensor is read: `--help`, and the plan of a large merge."""

from __future__ import annotations

import re

from merges import Bench, Merge
from processes import measure, median
from report import Row

MIB = 2**20


def measure_help(bench: Bench) -> list[Row]:
    """Return the time of `raymerge --help`, and whether it imports what is heavy."""
    log = bench.workdir / "help.log"
    command = [str(bench.raymerge), "--help"]
    measure(command, log=log)
    usages = [measure(command, log=log) for _ in range(max(bench.repeats, 5))]
    measure(command, log=log, env={"PYTHONPROFILEIMPORTTIME": "1"})
    imported = set(re.findall(r"^import time:.*\|\s*(\w+)$", log.read_text(), flags=re.MULTILINE))
    heavy = sorted(imported & {"torch", "ray", "numpy", "pyarrow"})
    wall = median(usages, lambda usage: usage.wall)
    is_light = not imported & {"torch", "ray"}
    return [
        Row(
            "raymerge --help",
            "at most 0.5 s, without importing torch or ray",
            f"{wall:.2f} s, " + (f"imports {', '.join(heavy)}" if heavy else "no torch, ray, numpy or pyarrow"),
            wall <= 0.5 and is_light,
            f"median of {len(usages)}, {median(usages, lambda usage: usage.cpu):.2f} s CPU",
            {"raymerge": [usage.to_json() for usage in usages], "imported": sorted(imported)},
        )
    ]


def measure_plan(bench: Bench) -> list[Row]:
    """Return the time and the peak of `raymerge plan` for five models of 70 B parameters."""
    merge = Merge("ties", weights=(1.0,) * 4, densities=(0.5,) * 4, has_base=True)
    config = bench.write_config(merge, "llama-70b")
    log = bench.workdir / "plan.log"
    usages = [measure([bench.raymerge, "plan", config], log=log, is_sampled=True) for _ in range(bench.repeats)]
    wall = median(usages, lambda usage: usage.wall)
    peak = max(usage.peak_rss for usage in usages)
    return [
        Row(
            "raymerge plan, Llama-3-70B × 5",
            "at most 3 s, RSS at most 400 MB",
            f"{wall:.2f} s, {peak / 1e6:.0f} MB",
            wall <= 3 and peak <= 400e6,
            f"ties of 4 + base; median wall and largest ru_maxrss of {len(usages)}",
            {"raymerge": [usage.to_json() for usage in usages]},
        )
    ]
