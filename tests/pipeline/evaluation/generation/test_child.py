"""Processes whose parent is killed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

PARENT = """
import subprocess, sys, time
from raymerge.pipeline.evaluation.generation.child import Child

words = ["sh", "-c", "sleep 600 & echo $$ $! > pids.new; mv pids.new pids; wait"]
with open("out", "wb") as out:
    child = Child(words, stdin=subprocess.DEVNULL, stdout=out, stderr=out, environment={"PATH": "/usr/bin:/bin"})
if sys.argv[1] == "end":
    while not __import__("os").path.exists("pids"):
        time.sleep(0.01)
    child.end()
    print(child.process.returncode, child._watcher.returncode)
else:
    time.sleep(600)
"""


def list_running(pids: list[str]) -> list[str]:
    """Return the processes that run; not those that their parent has yet to collect."""
    if not pids:
        return []
    shown = subprocess.run(
        ["ps", "-o", "pid=,stat=", "-p", ",".join(pids)], capture_output=True, text=True, check=False
    )
    return [line for line in shown.stdout.splitlines() if line.split()[1][0] != "Z"]


def wait_for(path: Path) -> list[str]:
    deadline = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return path.read_text().split()


def wait_until_ended(pids: list[str]) -> None:
    deadline = time.monotonic() + 60
    while list_running(pids):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_a_process_has_started_ends_when_it_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, "wait"], cwd=tmp_path)
    pids = wait_for(tmp_path / "pids")
    assert len(list_running(pids)) == 2
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until_ended(pids)


def test_what_a_process_has_started_can_be_ended(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PARENT, "end"], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["-9", "0"]
    wait_until_ended(wait_for(tmp_path / "pids"))


def list_in(directory: Path) -> list[str]:
    """Return the processes that run in a directory."""
    found = []
    for own in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile, or is somebody else's
            if (own / "cwd").readlink() == directory:
                found.append(own.name)
    return found


def test_a_process_that_no_shell_can_watch_is_ended_at_once(tmp_path: Path) -> None:
    code = PARENT.replace('["sh", "-c",', f'["{shutil.which("sh")}", "-c",')
    environment = {"PATH": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    parent = [sys.executable, "-c", code, "wait"]
    done = subprocess.run(parent, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert "No such file or directory: 'sh'" in done.stderr
    wait_until_ended(list_in(tmp_path))
