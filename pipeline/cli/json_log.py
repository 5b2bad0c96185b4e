"""Writes how a merge goes for machines: a JSON object a line."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from raymerge.pipeline.cli.exits import explain
from raymerge.pipeline.cli.interrupt import announced_by, held_interrupts
from raymerge.pipeline.progress.codec import format_event
from raymerge.pipeline.progress.events import Event, MergeFailed, Planned, Progressed
from raymerge.pipeline.progress.report import format_planned

_INTERVAL_SECONDS = 2.0
"""Between two lines of progress, at least."""

_LOCK_SECONDS = 1.0
"""For another thread to write its event; it may wait for a reader that does not read, and the process is to end."""


class JsonLog:
    """Prints events to stdout."""

    def __init__(self, *, verbose: bool) -> None:
        self._verbose = verbose
        self._last = -_INTERVAL_SECONDS
        self._is_over = False
        self._lock = threading.Lock()

    def show(self, event: Event) -> None:
        """Print one event; go on without if nobody reads any more. Safe to use from several threads."""
        if isinstance(event, Progressed):
            is_last = event.num_finished == event.num_shards
            if time.monotonic() - self._last < _INTERVAL_SECONDS and not is_last:
                return
            self._last = time.monotonic()
        if isinstance(event, Planned):
            event = replace(event, text=format_planned(event, verbose=self._verbose))
        if not self._lock.acquire(timeout=_LOCK_SECONDS):
            return
        try:
            with held_interrupts():  # none leaves half a line
                if not self._is_over:
                    self._is_over = isinstance(event, MergeFailed)
                    print(format_event(event), flush=True)
        except OSError:  # nobody reads, or the disk is full
            self._is_over = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed
        finally:
            self._lock.release()


@contextmanager
def open_json_log(*, verbose: bool) -> Iterator[JsonLog]:
    """Have events printed; an error is the last of them, and ends the process with its exit code."""
    log = JsonLog(verbose=verbose)
    with announced_by(lambda: log.show(explain(KeyboardInterrupt()))):
        try:
            yield log
        except BaseException as error:
            failed = explain(error)
            log.show(failed)
            sys.exit(failed.exit_code)
