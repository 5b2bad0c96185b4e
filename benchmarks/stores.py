"""What it costs to move bytes from and to S3, in a merge and without one, against obstore alone."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from checkpoints import family_paths
from merges import LINEAR, Bench, weights
from processes import Usage, median
from report import Row
from store_servers import S3, merge_s3, run, serve, write_config  # makes `tests` known

from tests.servers.static import OUTPUT

FAMILY = "qwen2-0.5b"
TINY_SHARD = "200KB"
"""Cuts the tiny model in two, so that as many workers start."""


def read_settings() -> dict[str, int]:
    """Return how raymerge reads and writes; asked for in a process of its own, as this one has to stay small."""
    script = Path(__file__).with_name("seam_client.py")
    printed = subprocess.run([sys.executable, script, "settings"], check=True, capture_output=True, text=True).stdout
    settings: dict[str, int] = json.loads(printed)
    return settings


def make_job(inputs: Sequence[Path], written: dict[str, int], num_processes: int) -> Any:
    """Return a job for bare_client.py: all weights of the inputs, and files as large as those written."""
    reads = [(model.name, file.name, file.stat().st_size) for model in inputs for file in weights([model])]
    writes = [
        (OUTPUT, f"bare/{name.rpartition('/')[2]}", nbytes)
        for name, nbytes in written.items()
        if name.endswith(".safetensors")
    ]
    return {"reads": reads, "writes": writes, "num_processes": num_processes, **read_settings()}


def run_bare(bench: Bench, s3: S3, job: Path) -> Usage:
    """Move a job's bytes."""
    s3.sink.clear()
    command: list[str | Path] = [sys.executable, Path(__file__).with_name("bare_client.py"), "transfer", job]
    return run(bench, command, log="bare", env=s3.environment(), directory=s3.home)


@dataclass
class Runs:
    """Every measurement of the merge and of the bare client, taken in turn."""

    raymerge: list[Usage] = field(default_factory=list)
    raymerge_tiny: list[Usage] = field(default_factory=list)
    bare: list[Usage] = field(default_factory=list)
    bare_tiny: list[Usage] = field(default_factory=list)
    server_cpu: list[float] = field(default_factory=list)
    """Seconds, during a merge."""

    def to_json(self) -> dict[str, Any]:
        """Return the measurements by who ran."""
        usages = {who: [usage.to_json() for usage in getattr(self, who)] for who in _WHO}
        return {**usages, "server_cpu": self.server_cpu}


_WHO = ("raymerge", "raymerge_tiny", "bare", "bare_tiny")


def measure_transfer(bench: Bench) -> list[Row]:
    """Return the rows of linear × 3 from S3 to S3 against a client that only moves the same bytes."""
    runs = Runs()
    num_processes = len(os.sched_getaffinity(0))
    bench.make_family(FAMILY, 3)
    bench.make_family("tiny", 3)
    inputs = LINEAR.inputs(bench.checkpoints, FAMILY)
    for _ in range(bench.repeats):
        for family, ours, theirs in (
            (FAMILY, runs.raymerge, runs.bare),
            ("tiny", runs.raymerge_tiny, runs.bare_tiny),
        ):
            paths = LINEAR.inputs(bench.checkpoints, family)
            config = write_config(bench, LINEAR, family, [path.name for path in paths])
            bench.warm(paths)
            with serve(bench, bench.checkpoints / family) as s3:
                before = s3.cpu_seconds()
                options = () if family == FAMILY else ("--shard-size", TINY_SHARD)
                ours.append(merge_s3(bench, s3, config, *options))
                if family == FAMILY:
                    runs.server_cpu.append(s3.cpu_seconds() - before)
                job = bench.workdir / f"job-{family}.json"
                job.write_text(json.dumps(make_job(paths, s3.sink.sizes(), num_processes)))
                theirs.append(run_bare(bench, s3, job))
    nbytes = sum(file.stat().st_size for file in weights(inputs)) * 4 // 3
    return [_row_of_ratio(runs, "whole process", 0, nbytes), _row_of_ratio(runs, "without start-up", 1, nbytes)]


def _row_of_ratio(runs: Runs, name: str, weight_of_tiny: int, nbytes: int) -> Row:
    def middle(what: Callable[[Usage], float]) -> tuple[float, float]:
        ours = median(runs.raymerge, what) - weight_of_tiny * median(runs.raymerge_tiny, what)
        theirs = median(runs.bare, what) - weight_of_tiny * median(runs.bare_tiny, what)
        return ours, theirs

    wall, bare_wall = middle(lambda usage: usage.wall)
    cpu, bare_cpu = middle(lambda usage: usage.cpu)
    server = statistics.median(runs.server_cpu)
    return Row(
        f"S3 to S3, linear (3), {name}: raymerge : obstore alone, wall",
        "at most 1.25 : 1",
        f"{wall / bare_wall:.2f} : 1",
        wall / bare_wall <= 1.25,
        f"raymerge {wall:.2f} s wall, {cpu:.2f} s CPU; obstore {bare_wall:.2f} s, {bare_cpu:.2f} s; CPU"
        f" {cpu / bare_cpu:.2f} : 1; servers {server:.2f} s CPU besides, for {nbytes / 1e9:.1f} GB;"
        f" medians of {len(runs.raymerge)}",
        runs.to_json(),
    )


def measure_seam(bench: Bench) -> list[Row]:
    """Return the CPU seconds per GB read and written through the storage seam, against obstore alone."""
    bench.make_family(FAMILY, 1)
    model = family_paths(bench.checkpoints, FAMILY, 1)[1:]
    sizes = {f"{number}.safetensors": 128_000_000 for number in range(4)}
    job = bench.workdir / "job-seam.json"
    job.write_text(json.dumps(make_job(model, sizes, 1)))
    costs: dict[str, list[dict[str, float]]] = {}
    with serve(bench, bench.checkpoints / FAMILY) as s3:
        for _ in range(bench.repeats):
            for client, operations in CLIENTS.items():
                for operation in operations:
                    s3.sink.clear()
                    before = s3.cpu_seconds()
                    command: list[str | Path] = [
                        sys.executable,
                        Path(__file__).with_name(f"{client}.py"),
                        operation,
                        job,
                    ]
                    run(bench, command, log=client, env=s3.environment(), directory=s3.home)
                    cost = json.loads((bench.workdir / f"{client}.log").read_text().splitlines()[-1])
                    cost["server_cpu"] = s3.cpu_seconds() - before
                    costs.setdefault(f"{client} {operation}", []).append(cost)
    return [_row_of_seam("read", "read_into", costs), _row_of_seam("write", "write_from", costs)]


CLIENTS = {"seam_client": ("read", "write"), "bare_client": ("read", "read_into", "write", "write_from")}
"""Their operations."""


def _row_of_seam(operation: str, copying: str, costs: dict[str, list[dict[str, float]]]) -> Row:
    def middle(client: str, what: str) -> float:
        return statistics.median(cost[what] / cost["nbytes"] * 1e9 for cost in costs[client])

    own, bare, copied = f"seam_client {operation}", f"bare_client {operation}", f"bare_client {copying}"
    ours, theirs, with_copy = (middle(client, "cpu") for client in (own, bare, copied))
    return Row(
        f"CPU per GB, {operation} through the seam : obstore alone",
        "at most 1.2 : 1",
        f"{ours / theirs:.2f} : 1",
        ours <= 1.2 * theirs,
        f"{ours:.2f} and {theirs:.2f} s/GB in one process; obstore and a copy between its memory and the caller's"
        f" {with_copy:.2f} s/GB, {ours / with_copy:.2f} : 1;"
        f" {1 / middle(own, 'wall'):.2f}, {1 / middle(bare, 'wall'):.2f} and {1 / middle(copied, 'wall'):.2f} GB/s;"
        f" servers {middle(own, 'server_cpu'):.2f} s/GB besides;"
        f" medians of {len(costs[own])}",
        {client: costs[client] for client in (own, bare, copied)},
    )
