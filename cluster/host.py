"""The machine that this process runs on: its name, its cores and its memory."""

from __future__ import annotations

import os
import socket
from contextlib import suppress
from pathlib import Path

_names: list[str] = []


def name_host(name: str) -> None:
    """Give this machine the name by which the driver knows it."""
    _names[:] = [name]


def find_host() -> str:
    """Return this machine's name: the one that it was given, or its own."""
    return _names[0] if _names else socket.gethostname()


def count_cores() -> int:
    """Return the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def measure_memory() -> int:
    """Return the memory that this machine, or the container that this process is in, has in bytes."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        with suppress(OSError, ValueError):  # another system, or "max"
            limits.append(int(Path(path).read_text()))
    return min(limits)
