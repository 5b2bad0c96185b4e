"""Clusters of several machines to measure merges on: those of the tests, with inputs in their S3 server."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merges import Bench, Merge

sys.path.append(str(Path(__file__).resolve().parent.parent))

from tests.servers.ray_hosts import RayHosts

BUCKET = "models"
_DRIVER = Path(__file__).with_name("cluster_driver.py")


def start_hosts(num_workers: int) -> RayHosts:
    """Return a cluster of a head and so many workers, to be used in a `with` block."""
    return RayHosts(num_workers)


@dataclass(frozen=True)
class Run:
    """A merge that has succeeded."""

    seconds: float
    """From the start of the command to its end; of all commands that it took."""
    merge_seconds: float
    """From the first shard's start to the last one's end."""
    faults: dict[str, int]
    """How often what was got over."""
    driver: dict[str, Any]
    """What the last driver says of itself."""


class Cluster:
    """A cluster whose S3 server has the inputs of one merge."""

    def __init__(self, hosts: RayHosts, bench: Bench, merge: Merge, family: str) -> None:
        self.hosts = hosts
        self.client = hosts.s3.client()
        hosts.s3.create_bucket(BUCKET)
        bench.make_family(family, merge.num_tunes)
        inputs = merge.inputs(bench.checkpoints, family)
        for model in inputs:
            for file in model.iterdir():
                with file.open("rb") as body:
                    self.client.put_object(Bucket=BUCKET, Key=f"{model.name}/{file.name}", Body=body)
        text = merge.to_yaml(inputs)
        for model in inputs:
            text = text.replace(f'"{model}"', f'"s3://{BUCKET}/{model.name}"')
        (hosts.head.tmp / "merge.yml").write_text(text)

    def merge(self, out: str, shard_size: str, disturb: Callable[[Driver], None] = lambda driver: None) -> Run:
        """Merge into a prefix of the bucket, while `disturb` does what it likes."""
        start = time.monotonic()
        driver = Driver(self, out, shard_size)
        disturb(driver)
        return driver.finish(start)

    def etags(self, out: str) -> dict[str, str]:
        """Return what tells the content of every object under a prefix, by relative name."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{out}/")
        objects = [item for page in pages for item in page.get("Contents", ())]
        return {item["Key"].removeprefix(f"{out}/"): item["ETag"] for item in objects}


class Driver:
    """A merge that runs on the head; it may be killed and started again."""

    def __init__(self, cluster: Cluster, out: str, shard_size: str) -> None:
        self.hosts = cluster.hosts
        self._log = self.hosts.head.tmp / f"{out}.log"
        options = {"address": self.hosts.address, "shard_size": shard_size}
        self._command: Sequence[str] = (
            "python", str(_DRIVER), "merge.yml", f"s3://{BUCKET}/{out}", json.dumps(options),
        )  # fmt: skip
        self.start()

    def start(self) -> None:
        """Start it."""
        self._process = self.hosts.head.start(*self._command, env=self.hosts.environment, log=self._log)

    def kill(self) -> None:
        """Kill it."""
        self.hosts.head.kill(self._process)

    def wait_for_shards(self, num_shards: int) -> None:
        """Wait until so many are finished."""
        while self._log.read_text().count("finished") < num_shards:
            if self._process.poll() is not None:
                raise AssertionError(self._log.read_text())
            time.sleep(0.05)

    def finish(self, start: float) -> Run:
        """Wait for the end of a merge that began then."""
        self._process.wait(600)
        seconds = time.monotonic() - start
        lines = self._log.read_text().splitlines()
        with suppress(ValueError, IndexError):
            driver = json.loads(lines[-1])
            return Run(seconds, driver["merge_seconds"], driver["faults"], driver)
        raise AssertionError("\n".join(lines[-30:]))
