"""Processes that end with the one that starts them, together with those of their group that they start themselves."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import IO

_WATCH = 'read -r _ || kill -s KILL -- "-$1"'
"""Ends a group of processes when its standard input is closed before a line comes, as it is if its parent is killed."""


class Child:
    """A process with a group of its own, which is ended by `end`, or by a shell if this process is killed.

    A process of the group that begins a session of its own leaves it, and is not ended.
    """

    def __init__(
        self,
        words: Sequence[str],
        *,
        stdin: int,
        stdout: int | IO[bytes],
        stderr: IO[bytes],
        environment: Mapping[str, str],
    ) -> None:
        """Start it.

        Args:
            words: the command.
            stdin: as `subprocess.Popen` takes it.
            stdout: the same.
            stderr: the same.
            environment: all of its variables.

        Raises:
            OSError: there is no such command, or no `sh`.
        """
        self.process = subprocess.Popen(
            words, stdin=stdin, stdout=stdout, stderr=stderr, env=environment, start_new_session=True
        )
        try:
            self._watcher = subprocess.Popen(
                ["sh", "-c", _WATCH, "sh", str(self.process.pid)],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            os.killpg(self.process.pid, signal.SIGKILL)  # nobody would end it
            self.process.wait()
            raise

    def end(self) -> None:
        """End the process and those that it has started."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._watcher.communicate(b"\n")  # before the number of the group may be that of another
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
