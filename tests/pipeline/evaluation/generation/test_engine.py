"""The process that has models in memory, while it has nothing to tell."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raymerge.pipeline.evaluation.generation.engine import Engine, EngineError


def is_running(number: str) -> bool:
    """Tell whether a process runs; not if its parent has yet to collect it."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", number], capture_output=True, text=True, check=False)
    return shown.stdout.strip()[:1] not in ("", "Z")


def test_a_process_that_tells_nothing_is_waited_for_and_given_up(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text("import time\ntime.sleep(600)\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    engine = Engine("transformers", {"PYTHONPATH": path}, timeout=0.6)
    checks: list[None] = []
    with pytest.raises(EngineError, match=r"told nothing for 0\.6 s \(--timeout\)"):
        list(engine.ask({"kind": "loss"}, lambda: checks.append(None)))
    assert checks
    assert engine._child is None


def test_what_a_process_has_started_ends_with_it(tmp_path: Path) -> None:
    started = tmp_path / "started"
    (tmp_path / "sitecustomize.py").write_text(
        "import subprocess\n"
        f"with open({str(started)!r}, 'w') as file:\n"
        "    file.write(str(subprocess.Popen(['sleep', '600']).pid))\n"
    )

    def stop_once_started() -> None:
        if started.exists() and started.read_text():
            raise InterruptedError

    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    with pytest.raises(InterruptedError):
        list(Engine("transformers", {"PYTHONPATH": path}).ask({"kind": "loss"}, stop_once_started))
    deadline = time.monotonic() + 120
    while is_running(started.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
