"""The command line, run as users run it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    code: int
    out: str
    err: str


Cli = Callable[..., Outcome]
"""Runs a command in this process; the fixture `cli`."""


def start_command(
    *arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Start a raymerge process."""
    return subprocess.Popen(
        [sys.executable, "-m", "raymerge", *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=cwd,
        env={**os.environ, **(env or {})},
    )


def run_command(*arguments: str | Path, cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Outcome:
    """Run a raymerge process to its end."""
    process = start_command(*arguments, cwd=cwd, env=env)
    out, err = process.communicate(timeout=120)
    return Outcome(process.returncode, out, err)
