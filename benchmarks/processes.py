"""Run a command and say what it cost: wall clock, processor time, memory.

The process that measures has to stay small: a child's peak on Linux starts from its parent's resident set at the
fork, so nothing here, nor in whoever calls, imports torch or numpy.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

MAX_OWN_RSS = 100 * 2**20
"""What this process may have held at most, or the children's peaks would be its own."""
SAMPLE_SECONDS = 0.05


class CommandFailedError(Exception):
    """A measured command ended with another exit code than 0; the message has the end of its output."""


@dataclass(frozen=True)
class Usage:
    """What one run of a command cost."""

    wall: float
    """Seconds."""
    cpu: float
    """Seconds, user and system, of the process and its children."""
    peak_rss: int
    """Bytes, of the largest process, as the kernel kept it (`ru_maxrss`)."""
    tree_rss: int = 0
    """Bytes, of the process and its descendants together, the largest of many samples; 0 if not sampled."""
    tree_pss: int = 0
    """Likewise, with shared pages divided among those who share them."""
    tree_anon: int = 0
    """Likewise, without what is mapped from files, as code is, which programs beside may share or not."""
    disk_nbytes: int = 0
    """Bytes that the process and its children read from disks, and not from the page cache (`ru_inblock`)."""

    def __add__(self, other: Usage) -> Usage:
        """Return the cost of both, one after the other."""
        return Usage(
            self.wall + other.wall,
            self.cpu + other.cpu,
            max(self.peak_rss, other.peak_rss),
            max(self.tree_rss, other.tree_rss),
            max(self.tree_pss, other.tree_pss),
            max(self.tree_anon, other.tree_anon),
            self.disk_nbytes + other.disk_nbytes,
        )

    def to_json(self) -> dict[str, float]:
        """Return the fields by name."""
        return asdict(self)


def measure(
    command: Sequence[str | Path], *, log: Path, env: Mapping[str, str] | None = None, is_sampled: bool = False
) -> Usage:
    """Run a command to its end and return what it cost; its output goes to `log`.

    Raises:
        CommandFailedError: it failed.
    """
    own_rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if own_rss > MAX_OWN_RSS:
        raise AssertionError(f"the measuring process holds {own_rss} bytes, which its children would inherit as peak")
    with log.open("wb") as output:
        started = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**_find_environment(), **(env or {})},
        )
        sampler = _Sampler(process.pid) if is_sampled else None
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if sampler:
        sampler.stop()
    if process.returncode:
        tail = log.read_text(errors="replace")[-1500:].strip()
        words = " ".join(str(word) for word in command)
        raise CommandFailedError(f"{words}\nended with exit code {process.returncode}:\n{tail}")
    return Usage(
        wall=wall,
        cpu=usage.ru_utime + usage.ru_stime,
        peak_rss=usage.ru_maxrss * 1024,
        tree_rss=sampler.rss if sampler else 0,
        tree_pss=sampler.pss if sampler else 0,
        tree_anon=sampler.anon if sampler else 0,
        disk_nbytes=usage.ru_inblock * 512,
    )


def _find_environment() -> dict[str, str]:
    """Return the variables of this process, but for one that has modules compiled each time: pip compiles them once."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def median(usages: Iterable[Usage], what: Callable[[Usage], float]) -> float:
    """Return the median of one quantity.

    >>> median([Usage(1, 2, 3), Usage(5, 2, 3), Usage(2, 2, 3)], lambda usage: usage.wall)
    2
    """
    return statistics.median(what(usage) for usage in usages)


class _Sampler:
    """A thread that keeps the largest memory of a process and its descendants."""

    def __init__(self, pid: int) -> None:
        self.rss = 0
        self.pss = 0
        self.anon = 0
        self._pid = pid
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()

    def stop(self) -> None:
        self._stopped.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stopped.wait(SAMPLE_SECONDS):
            pids = _descendants(self._pid)
            self.rss = max(self.rss, sum(_read_kilobytes(pid, "Rss:") for pid in pids) * 1024)
            self.pss = max(self.pss, sum(_read_kilobytes(pid, "Pss:") for pid in pids) * 1024)
            self.anon = max(self.anon, sum(_read_kilobytes(pid, "Pss_Anon:") for pid in pids) * 1024)


def _descendants(pid: int) -> list[int]:
    pids = [pid]
    for parent in pids:  # grows while it is walked
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            with suppress(OSError):
                pids += [int(child) for child in task.read_text().split()]
    return pids


def _read_kilobytes(pid: int, field: str) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith(field):
                return int(line.split()[1])
    return 0
