"""Time and memory of every method, in proportion to linear's; and the checkpoints of a training run."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checkpoints import link_family
from merges import Bench, weights
from processes import Usage, median
from report import Row, gib
from speed import FAMILY

NUM_TUNES, NUM_MANY = 3, 8
RUN_FAMILY = "narrow"
MATRIX_FAMILY = "small"
"""Methods of whole matrices take minutes for 100 million parameters."""
SLACK_NBYTES = 8 * 2**20
"""Room between the chunks of the allocators of two processes, which no plan counts."""


def measure_methods(bench: Bench) -> list[Row]:
    """Return each method's time against linear's on as many inputs: three fine-tunes and a base, or what it takes."""
    families = {False: bench.make_family(FAMILY, NUM_TUNES), True: bench.make_family(MATRIX_FAMILY, NUM_TUNES)}
    linear: dict[tuple[bool, int], Usage] = {}
    rows = []
    for method in _list_methods(bench):
        is_matrix = method["family"] == "matrices"
        config, inputs = _write_config(bench, method, families[is_matrix])
        key = is_matrix, len(inputs)
        if key not in linear:
            reference, _ = _write_config(bench, _find(bench, "linear"), inputs)
            bench.warm(inputs)
            linear[key] = _median([bench.run_raymerge(reference) for _ in range(bench.repeats)])
        bench.warm(inputs)
        usage = _median([bench.run_raymerge(config) for _ in range(bench.repeats)])
        bench.clear(bench.raymerge_out)
        rows.append(_compare(method, usage, linear[key], inputs))
    return rows


def measure_methods_memory(bench: Bench) -> list[Row]:
    """Return each method's peak with eight fine-tunes, links to three, in 1 GiB."""
    bench.make_family(FAMILY, NUM_TUNES)
    members = link_family(bench.checkpoints, FAMILY, NUM_MANY)
    smallest = bench.make_family("tiny", NUM_TUNES)
    rows = []
    for method in _list_methods(bench):
        tiny, _ = _write_config(bench, method, smallest)
        start_up = bench.run_raymerge(tiny, "--shard-size", "5KB", is_sampled=True).tree_anon
        config, inputs = _write_config(bench, method, members)
        plan = bench.plan(config, "--memory", "1GiB")
        usage = bench.run_raymerge(config, "--memory", "1GiB", is_sampled=True)
        bench.clear(bench.raymerge_out)
        at_once = sorted((shard["projected_mem"] for shard in plan["shards"]), reverse=True)[: plan["num_workers"]]
        planned, peak = min(sum(at_once), plan["allowed_mem"]) + plan["plan_mem"], usage.tree_anon - start_up
        rows.append(
            Row(
                f"peak memory beyond start-up, {method['name']}, {len(inputs)} inputs, --memory 1GiB",
                "within the plan",
                f"{gib(peak)} of {gib(planned)}",
                peak <= planned + SLACK_NBYTES,
                f"sampled anonymous memory of the process tree, less {gib(start_up)} of a tiny merge; one run of"
                f" {usage.wall:.1f} s",
                {"raymerge": [usage.to_json()]},
            )
        )
    return rows


def measure_training_run(bench: Bench) -> list[Row]:
    """Return time per byte and memory of 100 checkpoints against those of 10, by a pattern; all but 3 are links."""
    bench.make_family(RUN_FAMILY, NUM_TUNES)
    rows = []
    for method, schedule in (("linear", "minus-sqrt"), ("geometric_median", "uniform")):
        per_gb, peaks, data = {}, {}, {}
        for count in (100, 10):
            models = link_family(bench.checkpoints, RUN_FAMILY, 100)[1:]
            run = {"glob": f"{models[0].parent}/tune*", "last": count, "schedule": schedule}
            config = bench.workdir / f"run-{method}-{count}.yml"
            config.write_text(json.dumps({"merge_method": method, "models": run, "dtype": "bfloat16"}))
            usages = [bench.run_raymerge(config, is_sampled=True) for _ in range(bench.repeats)]
            nbytes = sum(file.stat().st_size for file in weights(models[-count:]))
            per_gb[count] = median(usages, lambda usage: usage.wall) / nbytes * 1e9
            peaks[count] = max(usage.tree_anon for usage in usages)
            data[f"{count} checkpoints"] = [usage.to_json() for usage in usages]
        bench.clear(bench.raymerge_out)
        rows.append(
            Row(
                f"seconds per GB of input, {method}, 100 checkpoints : 10",
                "flat",
                f"{per_gb[100] / per_gb[10]:.2f} : 1",
                per_gb[100] <= 1.15 * per_gb[10],
                f"{per_gb[100]:.2f} and {per_gb[10]:.2f} s wall, whole process; memory {gib(peaks[100])} and"
                f" {gib(peaks[10])}; medians of {bench.repeats}",
                data,
            )
        )
    return rows


def _list_methods(bench: Bench) -> list[dict[str, Any]]:
    """Return the methods that take models and nothing besides."""
    done = subprocess.run([bench.raymerge, "methods", "--json"], check=True, stdout=subprocess.PIPE)
    methods: list[dict[str, Any]] = json.loads(done.stdout)
    return [method for method in methods if method["statistics"] is None]


def _find(bench: Bench, name: str) -> dict[str, Any]:
    return next(method for method in _list_methods(bench) if method["name"] == name)


def _write_config(bench: Bench, method: dict[str, Any], members: Sequence[Path]) -> tuple[Path, list[Path]]:
    """Write a method's own example on a family, the base first; return the config and its inputs."""
    text: str = method["example"]
    has_base = method["base"] == "required"
    tunes = list(members[1:] if has_base else members)[: method["max_models"]]
    head, entry = re.split(r"^models:\n", text, flags=re.MULTILINE)
    first, *rest = re.split(r"^(?=\w)", entry, flags=re.MULTILINE)
    item = re.split(r"^(?=- )", first, flags=re.MULTILINE)[1]
    models = "".join(re.sub(r"model: \S+", f"model: {path}", item) for path in tunes)
    config = bench.workdir / f"{method['name']}-{len(members)}.yml"
    config.write_text(head.replace("org/base", str(members[0])) + "models:\n" + models + "".join(rest))
    return config, [*members[: int(has_base)], *tunes]


def _median(usages: Sequence[Usage]) -> Usage:
    return sorted(usages, key=lambda usage: usage.wall)[len(usages) // 2]


def _compare(method: dict[str, Any], usage: Usage, linear: Usage, inputs: Sequence[Path]) -> Row:
    is_matrix, is_measured = method["family"] == "matrices", method["cost"]["passes"] > 0
    most = 2.5 if is_measured and method["family"] in ("deltas", "elements") else 1.5
    nbytes = sum(file.stat().st_size for file in weights(inputs))
    return Row(
        f"{method['name']} : linear, {len(inputs)} inputs",
        "GB/s" if is_matrix else f"at most {most} : 1",
        f"{nbytes / usage.wall / 1e9:.2f} GB/s" if is_matrix else f"{usage.wall / linear.wall:.2f} : 1",
        is_matrix or usage.wall <= most * linear.wall,
        f"{usage.wall:.2f} and {linear.wall:.2f} s wall, {usage.cpu:.2f} and {linear.cpu:.2f} s CPU, whole process",
        {"raymerge": [usage.to_json()], "linear": [linear.to_json()]},
    )
