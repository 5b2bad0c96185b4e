"""Cost of more models, and of smaller tensors, in proportion to their bytes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from checkpoints import link_family
from merges import LINEAR, TIES, Bench, Merge, weights
from processes import Usage, median
from report import Row, gib
from speed import FAMILY

NUM_MANY, NUM_FEW = 20, 3
MAX_RATIO = 1.15
TINY_SHARD = "5KB"
"""Cuts the tiny model into so many shards that its workers live long enough to be sampled."""
SLACK_NBYTES = 4 * 2**20
"""Room between the chunks of a process's allocator, which no plan counts."""


def measure_twenty_models(bench: Bench) -> list[Row]:
    """Return the time per byte, and the memory, of 20 fine-tunes against 3; all but 3 are links."""
    bench.make_family(FAMILY, NUM_FEW)
    return [row for merge in (LINEAR, TIES) for row in _measure_twenty(bench, merge)]


def _measure_twenty(bench: Bench, method: Merge) -> list[Row]:
    sizes: dict[int, int] = {}
    configs: dict[int, Path] = {}
    for count in (NUM_MANY, NUM_FEW):
        densities = (0.5,) * count if method.densities else ()
        merge = replace(method, weights=(1 / count,) * count, densities=densities)
        members = link_family(bench.checkpoints, FAMILY, count)
        inputs = members if merge.has_base else members[1:]
        sizes[count] = sum(file.stat().st_size for file in weights(inputs))
        configs[count] = bench.workdir / f"{merge.method}-{count}-links.yml"
        configs[count].write_text(merge.to_yaml(inputs))
    originals = link_family(bench.checkpoints, FAMILY, NUM_FEW)
    runs: dict[int, list[Usage]] = {count: [] for count in configs}
    for _ in range(bench.repeats):
        for count, config in configs.items():
            bench.warm(originals)
            runs[count].append(bench.run_raymerge(config))
    sampled = {count: bench.run_raymerge(config, is_sampled=True) for count, config in configs.items()}
    tiny = bench.write_config(method, "tiny")
    start_up = bench.run_raymerge(tiny, "--shard-size", TINY_SHARD, is_sampled=True).tree_anon
    bench.clear(bench.raymerge_out)
    peaks = {count: usage.tree_anon - start_up for count, usage in sampled.items()}
    plans = {count: _project_memory(bench, config) for count, config in configs.items()}

    def per_gb(count: int, what: Callable[[Usage], float]) -> float:
        return median(runs[count], what) / sizes[count] * 1e9

    wall, few_wall = (per_gb(count, lambda usage: usage.wall) for count in (NUM_MANY, NUM_FEW))
    cpu, few_cpu = (per_gb(count, lambda usage: usage.cpu) for count in (NUM_MANY, NUM_FEW))
    base = " + base" if method.has_base else ""
    name = f"{method.method}, {NUM_MANY}{base} : {NUM_FEW}{base}"
    return [
        Row(
            f"seconds per GB of input, {name}",
            f"at most {MAX_RATIO} : 1",
            f"wall {wall / few_wall:.2f} : 1, CPU {cpu / few_cpu:.2f} : 1",
            wall <= MAX_RATIO * few_wall and cpu <= MAX_RATIO * few_cpu,
            f"{wall:.2f} and {few_wall:.2f} s wall, {cpu:.2f} and {few_cpu:.2f} s CPU per GB, whole process,"
            f" {sizes[NUM_MANY] / 1e9:.1f} and {sizes[NUM_FEW] / 1e9:.1f} GB; medians of {bench.repeats}",
            {f"{count} fine-tunes": [usage.to_json() for usage in usages] for count, usages in runs.items()},
        ),
        Row(
            f"peak memory beyond start-up, {name}",
            "within the plan",
            f"{gib(peaks[NUM_MANY])} of {gib(plans[NUM_MANY])}, {gib(peaks[NUM_FEW])} of {gib(plans[NUM_FEW])}",
            all(peaks[count] <= plans[count] for count in peaks),
            f"sampled anonymous memory of the process tree, {gib(sampled[NUM_MANY].tree_anon)} and"
            f" {gib(sampled[NUM_FEW].tree_anon)}, less {gib(start_up)} of a tiny merge; planned for the shards at"
            " work and the plan itself, and 4 MiB of slack for each process; one run",
        ),
    ]


def _project_memory(bench: Bench, config: Path) -> int:
    """Return the planned memory of the plan itself and of the shards in work at once, in bytes, and some slack."""
    plan = bench.plan(config)
    projected: list[int] = sorted((shard["projected_mem"] for shard in plan["shards"]), reverse=True)
    num_workers = int(plan["num_workers"])
    at_once = min(sum(projected[:num_workers]), int(plan["allowed_mem"]))
    return at_once + int(plan["plan_mem"]) + (num_workers + 1) * SLACK_NBYTES


def measure_small_tensors(bench: Bench) -> list[Row]:
    """Return the time of a model of 20,000 small tensors against one of as many bytes in few large ones."""
    merge = Merge("linear", weights=(0.6, 0.4))
    runs: dict[str, list[Usage]] = {"many-small": [], "few-large": []}
    configs = {family: bench.write_config(merge, family) for family in runs}
    for _ in range(bench.repeats):
        for family, config in configs.items():
            bench.warm(merge.inputs(bench.checkpoints, family))
            runs[family].append(bench.run_raymerge(config))
    bench.clear(bench.raymerge_out)
    num_small, num_large = (bench.plan(config)["num_tensors"] for config in configs.values())
    nbytes = sum(file.stat().st_size for file in weights(merge.inputs(bench.checkpoints, "few-large")))
    small, large = (median(runs[family], lambda usage: usage.wall) for family in runs)
    small_cpu, large_cpu = (median(runs[family], lambda usage: usage.cpu) for family in runs)
    return [
        Row(
            f"{num_small:,} small tensors : as many bytes in {num_large} tensors, linear (2)",
            "at most 1.4 : 1",
            f"{small / large:.2f} : 1",
            small <= 1.4 * large,
            f"{small:.2f} and {large:.2f} s wall, {small_cpu:.2f} and {large_cpu:.2f} s CPU, whole process;"
            f" {nbytes / 1e9:.1f} GB read; medians of {bench.repeats}",
            {family: [usage.to_json() for usage in usages] for family, usages in runs.items()},
        )
    ]
