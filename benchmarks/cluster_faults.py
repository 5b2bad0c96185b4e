"""What it costs a merge on a cluster when something is lost on the way."""

from __future__ import annotations

import os
import random
import signal
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path

from cluster_hosts import BUCKET, Cluster, Driver, Run, start_hosts
from merges import LINEAR, Bench
from report import Row

_SPEED = 2_000_000
"""Bytes per second through each worker's cable, in each direction: a shard takes two seconds and more."""
_SHARD_SIZE = "1500kB"
_MANY_SPEED = 5_000_000
_MANY_SHARD_SIZE = "5MB"
"""For nine rounds of shards on four workers, each of three seconds."""
_NUM_UNDISTURBED = 3
_NUM_STOPPED = 5
_LEAVING_SECONDS = 10.0
"""In which Ray ends a stopped process, when it is told to."""
_MAX_SLOWDOWN = 1.3
"""Asked of a run with one of four workers stopped."""


def measure_faults(bench: Bench) -> list[Row]:
    """Return what each kind of loss costs, on two workers, and whether the bytes are those of an undisturbed run."""
    chance = random.Random(0)
    with start_hosts(2) as hosts:
        cluster = Cluster(hosts, bench, LINEAR, "small")
        for worker in hosts.workers:
            worker.limit(_SPEED)
        merges = _Merges(cluster)
        undisturbed = [merges.run("undisturbed", lambda driver: None) for _ in range(_NUM_UNDISTURBED)]
        seconds = statistics.median(run.seconds for run in undisturbed)
        rows = []
        for name, times, asked, disturb in FAULTS:
            runs = []
            for _ in range(times):
                runs.append(merges.run(name, partial(disturb, chance=chance)))
                merges.repair()
            rows.append(_row(name, runs, merges, seconds, asked))
    return rows


def measure_straggler(bench: Bench) -> list[Row]:
    """Return how much longer a merge on four workers takes of which one is stopped in the middle of a shard."""
    chance = random.Random(0)
    with start_hosts(4) as hosts:
        cluster = Cluster(hosts, bench, LINEAR, "narrow")
        for worker in hosts.workers:
            worker.limit(_MANY_SPEED)
        merges = _Merges(cluster, _MANY_SHARD_SIZE)
        undisturbed = [merges.run("undisturbed", lambda driver: None) for _ in range(_NUM_UNDISTURBED)]
        stopped: list[int] = []
        disturb = partial(_stop_worker, chance=chance, stopped=stopped)
        runs = [merges.run("one of four stopped", disturb) for _ in range(_NUM_STOPPED)]
        time.sleep(_LEAVING_SECONDS)
        num_left = len(hosts.s3.uploads_of(BUCKET)) + sum(Path(f"/proc/{pid}").exists() for pid in stopped)
    seconds = statistics.median(run.merge_seconds for run in undisturbed)
    ratios = sorted(run.merge_seconds / seconds for run in runs)
    num_struck = sum(bool(run.faults) for run in runs)
    is_sound = not merges.num_different and not num_left and num_struck == len(runs)
    return [
        Row(
            f"one of four workers stopped in mid-shard, {len(runs)} times: all shards, against undisturbed",
            f"at most {_MAX_SLOWDOWN}, the same bytes, nothing left",
            f"{statistics.median(ratios):.2f}, at most {ratios[-1]:.2f}",
            is_sound and ratios[-1] <= _MAX_SLOWDOWN,
            f"{seconds:.1f} s undisturbed; {num_struck} struck a shard in work; {merges.num_different} with other"
            f" bytes; {num_left} uploads and processes left",
            {"undisturbed": [asdict(run) for run in undisturbed], "runs": [asdict(run) for run in runs]},
        )
    ]


class _Merges:
    """Merges into one prefix after the other, and compares what they have written."""

    def __init__(self, cluster: Cluster, shard_size: str = _SHARD_SIZE) -> None:
        self.num_different = 0
        self._shard_size = shard_size
        self._cluster = cluster
        self._expected: dict[str, str] = {}
        self._number = 0

    def run(self, name: str, disturb: Callable[[Driver], None]) -> Run:
        self._number += 1
        out = f"out-{self._number}"
        run = self._cluster.merge(out, self._shard_size, disturb)
        etags = self._cluster.etags(out)
        self._expected = self._expected or etags
        is_different = etags != self._expected
        self.num_different += is_different
        print(f"{name}: {run.seconds:.1f} s, {run.faults}{', OTHER BYTES' * is_different}", file=sys.stderr, flush=True)
        return run

    def repair(self) -> None:
        """Have all workers back."""
        hosts = self._cluster.hosts
        for worker in hosts.workers:
            if not worker.pids("raylet") or not worker.is_connected():
                worker.power_off()
                worker.power_on()
                hosts.join(worker)


def _kill_worker(driver: Driver, chance: random.Random) -> None:
    worker = chance.choice(driver.hosts.workers)
    for pid in driver.hosts.wait_for_work(worker, chance.randrange(100_000, 4_000_000)):
        os.kill(pid, signal.SIGKILL)


def _stop_worker(driver: Driver, chance: random.Random, stopped: list[int]) -> None:
    driver.wait_for_shards(chance.randrange(1, 30))
    worker = chance.choice(driver.hosts.workers)
    for pid in driver.hosts.wait_for_work(worker, chance.randrange(1_000_000, 10_000_000)):
        os.kill(pid, signal.SIGSTOP)
        stopped.append(pid)


def _kill_driver(driver: Driver, chance: random.Random) -> None:
    driver.wait_for_shards(chance.randrange(1, 5))
    driver.hosts.wait_for_work(chance.choice(driver.hosts.workers), chance.randrange(100_000, 2_000_000))
    driver.kill()
    driver.start()


def _power_off(driver: Driver, chance: random.Random) -> None:
    worker = chance.choice(driver.hosts.workers)
    driver.hosts.wait_for_work(worker, chance.randrange(100_000, 4_000_000))
    worker.power_off()


def _cut_off(driver: Driver, chance: random.Random) -> None:
    worker = chance.choice(driver.hosts.workers)
    driver.hosts.wait_for_work(worker, chance.randrange(100_000, 4_000_000))
    worker.cut_off()


FAULTS = (
    ("a worker process killed", 20, None, _kill_worker),
    ("the driver killed and run again", 5, None, _kill_driver),
    ("one of the two machines powered off", 5, None, _power_off),
    ("one of the two machines silently cut off", 3, 120.0, _cut_off),
)
"""How often, and what it may cost at most, in seconds."""


def _row(name: str, runs: list[Run], merges: _Merges, undisturbed: float, asked: float | None) -> Row:
    costs = sorted(run.seconds - undisturbed for run in runs)
    num_struck = sum(bool(run.faults) or run.driver["num_resumed"] > 0 for run in runs)
    is_met = num_struck == len(runs) and not merges.num_different and (asked is None or costs[-1] <= asked)
    return Row(
        f"{name}, {len(runs)} times: cost",
        "the same bytes" + (f", at most {asked:.0f} s" if asked else ""),
        f"{statistics.median(costs):.1f} s, at most {costs[-1]:.1f} s",
        is_met,
        f"{num_struck} struck a shard in work or a driver with shards finished;"
        f" {merges.num_different} with other bytes; an undisturbed run takes {undisturbed:.1f} s",
        {"runs": [asdict(run) for run in runs]},
    )
