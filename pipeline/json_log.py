"""Writes how a merge goes for machines: a JSON object a line."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from raymerge.pipeline.events import Event, Failed, explain, format_event
from raymerge.pipeline.interrupt import announced_by
from raymerge.pipeline.narrator import Narrator


class JsonLog(Narrator):
    """Prints events to stdout."""

    interval_seconds = 2.0

    def __init__(self, *, verbose: bool) -> None:
        super().__init__(verbose=verbose)
        self._is_over = False

    def show(self, event: Event) -> None:
        """Print one event; go on without if nobody reads any more."""
        if self._is_over:
            return
        self._is_over = isinstance(event, Failed)
        try:
            print(format_event(event), flush=True)
        except BrokenPipeError:
            self._is_over = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still to be flushed


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
