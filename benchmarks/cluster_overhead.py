"""What Ray costs: its start, a shard more, and slots that wait for the driver."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

from merges import LINEAR, Bench
from processes import Usage, measure, median
from report import Row

_DRIVER = Path(__file__).with_name("cluster_driver.py")
_SCHEDULING = Path(__file__).with_name("scheduling.py")


def measure_overhead(bench: Bench) -> list[Row]:
    """Return how much longer a merge takes on a Ray that is started for it than without."""
    bench.make_family("qwen2-0.5b", 3)
    config = bench.write_config(LINEAR, "qwen2-0.5b")
    local: list[Usage] = []
    ray: list[Usage] = []
    for _ in range(bench.repeats):
        for usages, options in ((local, ()), (ray, ("--ray",))):
            bench.warm(LINEAR.inputs(bench.checkpoints, "qwen2-0.5b"))
            usages.append(bench.run_raymerge(config, *options))
    without, with_ray = (median(usages, lambda usage: usage.wall) for usages in (local, ray))
    return [
        Row(
            "--ray, linear (3) of 0.5 B: whole process more than without",
            "at most 8 s",
            f"{with_ray - without:.1f} s",
            with_ray - without <= 8,
            f"{with_ray:.1f} s and {without:.1f} s; medians of {len(ray)}",
            {"local": [usage.to_json() for usage in local], "ray": [usage.to_json() for usage in ray]},
        )
    ]


def measure_per_shard(bench: Bench) -> list[Row]:
    """Return what one shard more costs the driver, with shards of a few KB."""
    bench.make_family("deep", 3)
    config = bench.write_config(LINEAR, "deep")
    few: list[dict[str, Any]] = []
    many: list[dict[str, Any]] = []
    for _ in range(bench.repeats):
        for runs, shard_size in ((few, "220kB"), (many, 1)):
            bench.clear(bench.raymerge_out)
            options = json.dumps({"ray": True, "shard_size": shard_size})
            runs.append(_run(bench, "driver", _DRIVER, config, bench.raymerge_out, options))
    num_more = many[0]["num_shards"] - few[0]["num_shards"]
    cpu, wall = (
        1000 * (statistics.median(run[what] for run in many) - statistics.median(run[what] for run in few)) / num_more
        for what in ("cpu", "merge_seconds")
    )
    return [
        Row(
            "--ray: driver's processor time for one shard more",
            "at most 10 ms",
            f"{cpu:.1f} ms",
            cpu <= 10,
            f"{many[0]['num_shards']} shards against {few[0]['num_shards']} of the same model of 8 MB; {wall:.1f} ms of"
            f" wall clock for one more, merging and writing it included; medians of {len(few)}",
            {"few": few, "many": many},
        )
    ]


def measure_scheduling(bench: Bench) -> list[Row]:
    """Return how busy slots are while items sleep: on a simulated cluster of 200 slots, and on Ray with a few."""
    rows = []
    for where, num_slots, num_items, asked in (("simulated", 200, 10_000, 0.95), ("ray", 4, 1_000, None)):
        runs = [
            _run(bench, "scheduling", _SCHEDULING, where, str(num_slots), str(num_items)) for _ in range(bench.repeats)
        ]
        busy, cpu = (statistics.median(run[what] for run in runs) for what in ("busy", "cpu_per_item"))
        rss = max(run["rss"] for run in runs)
        rows.append(
            Row(
                f"{num_items:,} items of 100 ms on {num_slots} slots, {where}: slots busy",
                "at least 95%, driver's RSS at most 500 MB" if asked else "",
                f"{busy:.1%}, {rss / 1e6:.0f} MB",
                busy >= asked and rss <= 500e6 if asked else None,
                f"{1000 * cpu:.2f} ms of the driver's processor time for an item; medians of {len(runs)}",
                {"runs": runs},
            )
        )
    return rows


def _run(bench: Bench, name: str, *command: str | Path) -> dict[str, Any]:
    log = bench.workdir / f"{name}.log"
    measure([sys.executable, *command], log=log)
    values: dict[str, Any] = json.loads(log.read_text().splitlines()[-1])
    return values
