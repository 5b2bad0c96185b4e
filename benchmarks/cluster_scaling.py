"""How much sooner a merge ends on four machines than on two, where the cables are what limits it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import asdict

from cluster_hosts import Cluster, Run, start_hosts
from merges import LINEAR, Bench
from report import Row

_SPEED = 10_000_000
"""Bytes per second through each worker's cable, in each direction: so few that the two cores, which serve, carry and
merge for all machines, are not what limits them."""
_SHARD_SIZE = "40MB"


def measure_scaling(bench: Bench) -> list[Row]:
    """Return the time of a merge on 2 workers against 4, from the first shard to the last and as a whole."""
    runs: dict[int, list[Run]] = {}
    with start_hosts(2) as hosts:
        cluster = Cluster(hosts, bench, LINEAR, "even")
        for num_workers in (2, 4):
            if num_workers > len(hosts.workers):
                hosts.add_workers(num_workers - len(hosts.workers))
            for worker in hosts.workers:
                worker.limit(_SPEED)
            runs[num_workers] = [
                cluster.merge(f"out-{num_workers}-{repeat}", _SHARD_SIZE) for repeat in range(bench.repeats)
            ]
    return [
        _row("the shards", runs, lambda run: run.merge_seconds, 1.85),
        _row("the whole command", runs, lambda run: run.seconds, None),
    ]


def _row(what: str, runs: dict[int, list[Run]], seconds: Callable[[Run], float], asked: float | None) -> Row:
    two, four = (statistics.median(map(seconds, runs[num_workers])) for num_workers in (2, 4))
    return Row(
        f"{what}, 2 machines : 4 machines, {_SPEED // 10**6} MB/s each",
        f"at least {asked} : 1" if asked else "",
        f"{two / four:.2f} : 1",
        two / four >= asked if asked else None,
        f"{two:.1f} s : {four:.1f} s, {runs[2][0].driver['num_shards']} shards; medians of {len(runs[2])}",
        {str(num_workers): [asdict(run) for run in some] for num_workers, some in runs.items()},
    )
