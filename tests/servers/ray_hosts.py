"""A Ray cluster on machines of its own, with an S3 server that all of them reach."""

from __future__ import annotations

import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Self

from tests.commands import Outcome
from tests.servers.hosts import Host, Network
from tests.servers.s3 import S3Server

PORT = 6379

SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # at 15 workers would hardly run where other tests do
}
"""For `ray start`."""


class RayHosts:
    """A head without processors, `head`, and workers with one each, `worker-1` and so on."""

    def __init__(self, num_workers: int) -> None:
        with ExitStack() as stack:
            self.network = stack.enter_context(Network())
            self.s3 = stack.enter_context(S3Server(self.network.address))
            self.environment = self.s3.environment()
            """Leads all to the S3 server."""
            self.head = self.network.add_host("head")
            options = ["--num-cpus=0", "--include-dashboard=false"]
            self._run(self.head, "ray", "start", "--head", f"--port={PORT}", *options)
            self.workers: list[Host] = []
            self.add_workers(num_workers)
            self._stack = stack.pop_all()

    def add_workers(self, num_workers: int) -> None:
        """Add hosts to the cluster."""
        first = len(self.workers) + 1
        added = [self.network.add_host(f"worker-{first + k}") for k in range(num_workers)]
        with ThreadPoolExecutor(num_workers) as pool:
            list(pool.map(self.join, added))
        self.workers += added

    @property
    def address(self) -> str:
        """Of the cluster."""
        return f"{self.head.address}:{PORT}"

    def join(self, worker: Host) -> None:
        """Start Ray on a host that is on."""
        self._run(worker, "ray", "start", f"--address={self.address}", "--num-cpus=1")

    def start_merge(self, out: str, *options: str, log: Path) -> subprocess.Popen[str]:
        """Start the merge of `merge.yml`, which is in the head's /tmp, on the head."""
        command = ["raymerge", "merge", "merge.yml", out, "--address", self.address, "-v", *options]
        return self.head.start(*command, env=self.environment, log=log)

    def wait_for_work(self, worker: Host, nbytes: int) -> list[int]:
        """Wait until a host has fetched so much of a shard, and return the processes that make it."""
        give_up = time.monotonic() + 300
        received: int | None = None
        while True:
            if not (pids := worker.pids("ray::serve")):
                received = None
            elif received is None:
                received = worker.received_nbytes()
            elif worker.received_nbytes() - received >= nbytes:
                return pids
            if time.monotonic() > give_up:
                raise AssertionError(f"{worker.name} has nothing to do")
            time.sleep(0.02)

    def stop(self) -> None:
        """Switch everything off."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _run(self, host: Host, *command: str) -> Outcome:
        outcome = host.run(*command, env=self.environment | SETTINGS)
        if outcome.code:
            raise AssertionError(f"{' '.join(command)} on {host.name}:\n{outcome.out}{outcome.err}")
        return outcome
