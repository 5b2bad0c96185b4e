"""The memory of this process, as the operating system counts it."""

from __future__ import annotations

import resource
import sys
from functools import cache
from pathlib import Path

_STATUS = Path("/proc/self/status")
"""File in which Linux gives the memory of this process."""


def peak_rss() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if _STATUS.exists():  # getrusage also counts what the process was before it was this program
        return _read_status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def measure_first_mem(process: int) -> tuple[int, int]:
    """Return the memory besides code that this process had when it was first asked, and its peak, in bytes."""
    return (_read_status("RssAnon") if _STATUS.exists() else peak_rss()), peak_rss()


def measure_peak(first_mem: int, first_peak: int) -> int:
    """Return how much more memory than at first there was, in bytes: at the peak, or now where that was before."""
    if peak_rss() > first_peak or not _STATUS.exists():
        return max(0, peak_rss() - _measure_code() - first_mem)
    return max(0, _read_status("RssAnon") - first_mem)


def _measure_code() -> int:
    """Return how much of this process's memory is code, which is loaded when it is used first, in bytes."""
    return _read_status("RssFile") if _STATUS.exists() else 0


def _read_status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024
