"""The command line, as the demos run it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def run_raymerge(*arguments: str, cwd: Path) -> None:
    """Run the command line, as a user would, in the models' directory."""
    print(f"$ raymerge {' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", "raymerge", *arguments], cwd=cwd, check=True)
