"""Work that several tests of workers give them."""

from __future__ import annotations

import os
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


def wait_until_gone(pid: int) -> None:
    give_up = time.monotonic() + 10
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < give_up, "the worker that hung is still there"
        time.sleep(0.1)
