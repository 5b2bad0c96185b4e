"""Loops that are compiled ahead, in processes of their own, and what becomes of those who need them meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from raymerge.ops.loops import ahead, delta_loops, sum_loops
from raymerge.ops.loops.code_files import CodeFile
from raymerge.ops.loops.compiler import Loop

USE = """
import sys
import numpy as np
from raymerge.ops.loops import delta_loops
from raymerge.ops.loops import sum_loops
from raymerge.ops.stored import Stored
stored = Stored(0, 2, memoryview(bytearray(np.array([1, 2, 3, 0], np.float32))), (0, 8), ("float32",) * 2)
magnitude = int(np.array(2, np.float32).view(np.uint32))
print(delta_loops.count_equal(*stored.sources(), 1, 2, magnitude, sum_loops.make_scratch(2)), "numba" in sys.modules)
"""
"""Counts the elements of a delta that are 2 or -2."""


def use() -> str:
    """Call `count_equal` in a process of its own; return its result, and whether that process compiled it."""
    return subprocess.run([sys.executable, "-c", USE], capture_output=True, text=True, check=True).stdout.strip()


def is_running(pid: int) -> bool:
    """Tell whether a process is there, and not only its exit code."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.fixture
def count_equal() -> Loop:
    loop: object = delta_loops.count_equal
    assert isinstance(loop, Loop)
    return loop


@pytest.fixture
def file(count_equal: Loop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> CodeFile:
    """The loop's file, in an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    file = count_equal.find_file()
    assert file is not None
    assert file.path.is_relative_to(tmp_path)
    return file


def test_what_is_in_the_cache_starts_no_process(count_equal: Loop, file: CodeFile) -> None:
    file.write(b"code")
    assert ahead.compile_ahead([count_equal], num_cores=2) is None


def test_what_others_compile_starts_no_process(count_equal: Loop, file: CodeFile) -> None:
    with file.hold():
        assert ahead.compile_ahead([count_equal], num_cores=2) is None


def test_without_a_cache_nothing_is_begun(count_equal: Loop, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/cache")
    assert ahead.compile_ahead([count_equal], num_cores=2) is None


@pytest.mark.slow
def test_who_needs_a_loop_waits_for_it(count_equal: Loop, file: CodeFile) -> None:
    others = [sum_loops.combine, delta_loops.count_high]
    compiling = ahead.compile_ahead([*others, count_equal], num_cores=2)  # type: ignore[list-item]
    assert compiling is not None
    try:
        assert not file.exists()
        assert use() == "2.0 False"
    finally:
        compiling.close()


@pytest.mark.slow
def test_who_needs_a_loop_compiles_it_where_the_processes_are_killed(count_equal: Loop, file: CodeFile) -> None:
    compiling = ahead.compile_ahead([count_equal], num_cores=2)
    assert compiling is not None
    os.killpg(compiling.process.pid, signal.SIGKILL)
    assert use() == "2.0 True"
    compiling.close()
    assert use() == "2.0 False"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_they_end_with_a_killed_merge(file: CodeFile) -> None:
    code = """
import os, signal, time
from raymerge.ops.loops import ahead
from raymerge.ops.loops import delta_loops
from raymerge.ops.loops import sum_loops
compiling = ahead.compile_ahead([delta_loops.count_equal, delta_loops.combine_deltas, sum_loops.combine], num_cores=2)
print(compiling.process.pid, flush=True)
while not delta_loops.count_equal.find_file().exists():
    time.sleep(0.01)
os.kill(os.getpid(), signal.SIGKILL)
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as driver:
        assert driver.stdout is not None
        leader = int(driver.stdout.readline())
    while is_running(leader):
        time.sleep(0.01)
    assert {path.name.partition("-")[0] for path in file.path.parent.glob("*[0-9a-f]")} == {"count_equal"}


@pytest.mark.slow
def test_without_a_compiler_they_end(count_equal: Loop, file: CodeFile, tmp_path: Path) -> None:
    (tmp_path / "numba.py").write_text("raise ImportError('no numba here')")
    sys.path.insert(0, str(tmp_path))
    try:
        compiling = ahead.compile_ahead([count_equal], num_cores=2)
    finally:
        sys.path.remove(str(tmp_path))
    assert compiling is not None
    assert compiling.process.wait() == 0
    assert not file.exists()
    compiling.close()
