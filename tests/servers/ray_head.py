"""A Ray cluster of one machine with a dashboard, as `ray start` makes it, that asks for a token."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Self

from tests.servers import ServerFailedError, free_ports


class RayHead:
    """Use it in a `with` block."""

    token = "a-token-of-the-tests-0000000001"

    def __init__(self, num_cpus: int) -> None:
        self._directory = Path(tempfile.mkdtemp(prefix="rm-", dir="/tmp"))
        (self._directory / "ray").mkdir()
        port, dashboard, client, agent = free_ports(4)
        self.address = f"127.0.0.1:{port}"
        """For a driver."""
        self.job_address = f"http://127.0.0.1:{dashboard}"
        """For clients of the job API."""
        self._log = self._directory / "log"
        tools = Path(sys.executable).parent
        command = [
            tools / "ray", "start", "--head", "--block", "--disable-usage-stats", "--node-ip-address", "127.0.0.1",
            "--port", port, "--dashboard-port", dashboard, "--ray-client-server-port", client,
            "--dashboard-agent-listen-port", agent, "--num-cpus", num_cpus, "--temp-dir", self._directory / "s",
            "--object-store-memory", 2**27,
        ]  # fmt: skip
        environment = {
            **os.environ,
            "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
            "RAY_TMPDIR": str(self._directory),
            "TMPDIR": str(self._directory),  # short, for the sockets in it
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_worker_niceness": "0",
        }
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [str(part) for part in command], env=environment, stdout=log, stderr=subprocess.STDOUT
            )
        self._wait_until_ready()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def kill_books(self) -> None:
        """Kill the process that keeps the cluster's books, without which a head is none."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                command = path.read_bytes().split(b"\0")
                if command[0].endswith(b"gcs_server") and str(self._directory).encode() in path.read_bytes():
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def stop(self) -> None:
        """End Ray; what runs on it is lost."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._directory, ignore_errors=True)

    def _wait_until_ready(self) -> None:
        give_up = time.monotonic() + 300
        request = urllib.request.Request(
            f"{self.job_address}/api/jobs/", headers={"Authorization": f"Bearer {self.token}"}
        )
        while True:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except (OSError, urllib.error.URLError):
                if self._process.poll() is not None or time.monotonic() > give_up:
                    log = self._log.read_text(errors="replace")[-2000:]
                    self.stop()
                    raise ServerFailedError(f"Ray did not get ready:\n{log}") from None
                time.sleep(0.2)
