"""The command line, run as users run it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import termios
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

PATIENCE_SECONDS = 600.0
"""In which whatever a test waits for happens, on any machine; none should wait for so long."""


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
"""Runs a command in this process; the fixture `cli`."""


def start_command(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start a raymerge process.

    Args:
        arguments: of the command.
        cwd: where it runs.
        env: changes to the environment; None takes a variable out.
        prefix: a program that starts it, such as `setpriv`, with its own arguments.
    """
    return start_program("-m", "raymerge", *arguments, cwd=cwd, env=env, prefix=prefix)


def start_program(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
) -> subprocess.Popen[str]:
    """Start this Python with some arguments; see `start_command`."""
    environment = {**os.environ, **(env or {})}
    return subprocess.Popen(
        [*prefix, sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={name: value for name, value in environment.items() if value is not None},
    )


def run_command(
    *arguments: str | Path,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
) -> Outcome:
    """Run a raymerge process to its end; see `start_command`."""
    process = start_command(*arguments, cwd=cwd, env=env, prefix=prefix)
    out, err = process.communicate(timeout=PATIENCE_SECONDS)
    return Outcome(process.returncode, out, err)


def run_in_terminal(*arguments: str | Path, columns: int = 80, env: Mapping[str, str | None] | None = None) -> str:
    """Run a raymerge process in a terminal of its own, and return all that it has sent there.

    Args:
        arguments: of the command.
        columns: the terminal's width.
        env: changes to the environment; None takes a variable out.
    """
    size = {"COLUMNS": None, "LINES": None}  # which test runners set, and which would hide the terminal's own
    environment = {**os.environ, **size, "TERM": "xterm-256color", **(env or {})}
    terminal, inside = os.openpty()
    termios.tcsetwinsize(inside, (24, columns))
    process = subprocess.Popen(
        [sys.executable, "-m", "raymerge", *map(str, arguments)],
        stdin=inside,
        stdout=inside,
        stderr=inside,
        env={name: value for name, value in environment.items() if value is not None},
        start_new_session=True,
    )
    os.close(inside)
    sent = b""
    with os.fdopen(terminal, "rb", buffering=0) as screen, suppress(OSError):  # EIO when nobody has it open any more
        while piece := screen.read(65536):
            sent += piece
    process.wait(timeout=PATIENCE_SECONDS)
    return sent.decode()


def strip_controls(sent: str) -> str:
    """Return what a terminal was sent without colours and movements."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent)
