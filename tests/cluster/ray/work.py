"""Work that several tests of workers give them."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from raymerge.cluster.runner import Progress, Report


def hang_at_first(item: int, report: Report, *, directory: Path) -> int:
    """Item 1 hangs once, after it has reported."""
    report(Progress(read_nbytes=1))
    if item == 1 and not (directory / "hung").exists():
        (directory / "hung").write_text(str(os.getpid()))
        time.sleep(3600)
    return item


def stop_at_first(item: int, report: Report, *, directory: Path) -> tuple[int, int]:
    """Report ten bytes in a second; the worker of item 0 is stopped at its first try, in the middle."""
    for number in range(10):
        report(Progress(read_nbytes=1))
        time.sleep(0.1)
        if item == 0 and number == 4 and not (directory / "stopped").exists():
            (directory / "stopped").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
    return item, os.getpid()


def crawl_at_first(item: int, report: Report, *, directory: Path) -> str:
    """Report a hundred bytes in a second, but of item 0 in minutes at the first try, and always that it is there.

    Files tell the tries of item 0 what to do: `slow-fail` and `fast-fail` to raise an error, `slow-hurry` to be as fast
    as others, `fast-hold` to wait. They leave files that say that they have ended.
    """
    is_slow = item == 0 and not (directory / "began").exists()
    if is_slow:
        (directory / "began").touch()
    name = "slow" if is_slow else "fast"

    def is_told(what: str) -> bool:
        return item == 0 and (directory / f"{name}-{what}").exists()

    try:
        for _ in range(100):
            report(Progress(read_nbytes=1))
            time.sleep(0.01)
            go_on_at = time.monotonic() + (1.5 if is_slow else 0.0)
            while is_told("hold") or (time.monotonic() < go_on_at and not is_told("hurry")):
                if is_told("fail"):
                    raise OSError(f"the {name} one has failed")
                report(Progress())
                time.sleep(0.01)
    finally:
        (directory / f"{name}-{item}-ended").touch()
    return f"{item} {name}"


def wait_until_gone(pid: int) -> None:
    give_up = time.monotonic() + 120
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < give_up, "the worker that hung is still there"
        time.sleep(0.1)
