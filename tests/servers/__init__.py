"""Real servers for tests: each listens on 127.0.0.1 only, on ports of its own, and dies with its process."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


def free_ports(num_ports: int) -> list[int]:
    """Return TCP ports of 127.0.0.1 that nobody listens on now."""
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(socket.socket()) for _ in range(num_ports)]
        for each in held:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in held]


class ServerProcess:
    """A program that serves until `stop`, with an environment of nothing but what is given.

    The kernel kills it when the thread that started it ends, so that an interrupted test run leaves nothing behind.
    """

    def __init__(
        self, command: Sequence[str | Path], *, directory: Path, environment: Mapping[str, str] | None = None
    ) -> None:
        self.log = directory / "log"
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=directory,
                env={"PATH": os.defpath, "HOME": str(directory), "TMPDIR": str(directory), **(environment or {})},
            )
        self.pid = self._process.pid

    def wait_until(self, is_ready: Callable[[], bool], *, timeout: float = 120) -> None:
        """Return when `is_ready` says so.

        Raises:
            ServerFailedError: the program ended, or was not ready within `timeout` seconds.
        """
        give_up = time.monotonic() + timeout
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > give_up:
                self.stop()
                log = self.log.read_text(errors="replace")[-2000:]
                raise ServerFailedError(f"{self._process.args!r} did not get ready:\n{log}")
            time.sleep(0.05)

    def cpu_seconds(self) -> float:
        """Return the CPU seconds, user and system, that the program and its living children have used."""
        ticks = 0
        for pid in (self.pid, *children_of(self.pid)):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def stop(self) -> None:
        """Kill the program, and wait until it is gone."""
        self._process.kill()
        self._process.wait()


class Reader:
    """Reads lines and bytes from a connection, and knows when it is about to wait for the peer."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._ahead = b""
        self.before_receive: Callable[[], object] = lambda: None
        """Called before each wait; an exception of it passes to the reader's caller."""

    def readline(self) -> bytes:
        """Return a line with its end; what there was at the end of the stream."""
        while b"\n" not in self._ahead and (data := self._receive(1 << 16)):
            self._ahead += data
        line, end, self._ahead = self._ahead.partition(b"\n")
        return line + end

    def read1(self, max_nbytes: int) -> bytes:
        """Return some bytes; none at the end of the stream."""
        if not self._ahead:
            return self._receive(max_nbytes)
        return self.take_ahead(max_nbytes)

    def take_ahead(self, max_nbytes: int) -> bytes:
        """Return what was received along with a line, and not yet read."""
        data, self._ahead = self._ahead[:max_nbytes], self._ahead[max_nbytes:]
        return data

    def read_head(self) -> bytes:
        """Return a message up to and including its empty line; nothing when the peer has closed before it.

        Raises:
            EOFError: the peer has closed in the middle.
        """
        lines: list[bytes] = []
        while (line := self.readline()) not in (b"\r\n", b"\n"):
            if not line.endswith(b"\n"):
                if lines or line:
                    raise EOFError
                return b""
            lines.append(line)
        return b"".join([*lines, line])

    def _receive(self, max_nbytes: int) -> bytes:
        self.before_receive()
        return self._connection.recv(max_nbytes)


def parse_headers(head: bytes) -> dict[str, str]:
    """Return the headers of a message by their names in lower case."""
    lines = head.decode("latin-1").split("\r\n")[1:]
    pairs = (line.partition(":") for line in lines if line)
    return {name.strip().lower(): value.strip() for name, _, value in pairs}


class ServerFailedError(Exception):
    """A server did not come up."""


def children_of(pid: int) -> list[int]:
    """Return the living children that the main thread of a process has started."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
