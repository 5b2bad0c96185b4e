"""The process that fresh workers are forked from."""

from __future__ import annotations

import multiprocessing
import multiprocessing.forkserver
import multiprocessing.util
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from functools import cache

from raymerge.cluster.directory import make_directory


def start_fork_server(preload: Sequence[str]) -> None:
    """Start the process that fresh workers are forked from, unless it runs already, and let it import.

    Args:
        preload: modules that workers need.
    """
    place_sockets()
    multiprocessing.get_context("forkserver").set_forkserver_preload(list(preload))
    multiprocessing.forkserver.ensure_running()


@cache
def place_sockets() -> None:
    """Have the fork server's socket in a directory that a later run deletes if this process is killed.

    multiprocessing makes a directory of its own in TMPDIR otherwise, whose name may be too long for sockets.
    """
    stack = ExitStack()
    multiprocessing.util.Finalize(None, stack.close, exitpriority=-200)  # after multiprocessing's own, at -100
    with suppress(OSError):
        directory = str(stack.enter_context(make_directory()))
        # private, but tempfile.tempdir would move the files of other threads, too
        multiprocessing.current_process()._config.setdefault("tempdir", directory)  # type: ignore[attr-defined]
