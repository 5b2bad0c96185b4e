"""Machine code of loops: compiled once, kept where only its user writes, compiled again where it cannot be used."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import FunctionType
from typing import TYPE_CHECKING

import numpy as np
import pytest

from raymerge.ops.loops.compiler import Loop

if TYPE_CHECKING:
    from raymerge.ops.loops.compiler import Array1

RUN = """
import sys
import numpy as np
from raymerge.ops.loops import sum_loops
from raymerge.ops.stored import STRIP, Slot, Stored, find_slots
out = bytearray(8)
stored = Stored(0, 2, memoryview(bytearray(np.array([1, 2, 30, 40], np.float32))), (0, 8), ("float32",) * 2)
slot = Slot(memoryview(out), "float32", np.zeros(STRIP, np.float32))
factors, divisors = np.array([[1, 0.5]], np.float32), np.ones(1, np.float32)
sums = np.zeros((1, STRIP), np.float32), np.zeros(1), sum_loops.make_scratch(sum_loops.NUM_DECODED + 1)
sum_loops.combine(*stored.sources(), factors, divisors, 0, 2, *find_slots([slot]), *sums)
print(*np.frombuffer(out, np.float32), "numba" in sys.modules, "torch" in sys.modules)
"""


def run(**variables: str) -> list[str]:
    """Run a loop in a process of its own; return its results and whether numba and torch were imported."""
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", RUN], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A directory with the code of one loop, and that code's file."""
    assert run(XDG_CACHE_HOME=str(tmp_path)) == ["16.0", "22.0", "True", "False"]
    (file,) = (tmp_path / "raymerge" / "loops").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    return file


@pytest.mark.slow
def test_the_next_process_needs_no_compiler(cache: Path) -> None:
    before = cache.stat()
    assert run(XDG_CACHE_HOME=str(cache.parents[2])) == ["16.0", "22.0", "False", "False"]
    assert cache.stat().st_mtime_ns == before.st_mtime_ns


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["cut", "changed", "empty", "writable"])
def test_code_that_is_not_as_it_was_written_is_compiled_again(cache: Path, fault: str) -> None:
    content = cache.read_bytes()
    if fault == "writable":
        cache.chmod(0o666)
    else:
        spoilt = {"cut": content[:-100], "changed": content[:-9] + b"\0" * 9, "empty": b""}
        cache.write_bytes(spoilt[fault])
    assert run(XDG_CACHE_HOME=str(cache.parents[2])) == ["16.0", "22.0", "True", "False"]
    assert cache.read_bytes() == content
    assert cache.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
def test_another_processor_has_code_of_its_own(cache: Path) -> None:
    variables = {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    assert run(XDG_CACHE_HOME=str(cache.parents[2]), **variables) == ["16.0", "22.0", "True", "False"]
    assert len(list(cache.parent.iterdir())) == 2


@pytest.mark.slow
@pytest.mark.parametrize("place", ["/proc/cache", "/dev/null"])
def test_a_cache_that_cannot_be_written_is_done_without(place: str) -> None:
    assert run(XDG_CACHE_HOME=place) == ["16.0", "22.0", "True", "False"]


def reshape(values: Array1[np.float32], count: int) -> None:
    values.reshape(count, 2)[0, 1] = 1


def make_array(values: Array1[np.float32], count: int) -> None:
    values[0] = np.zeros(count)[0]


@pytest.mark.slow
@pytest.mark.parametrize("function", [reshape, make_array])
def test_a_loop_that_needs_numba_when_it_runs_is_refused(function: FunctionType) -> None:
    with pytest.raises(RuntimeError, match=rf"{function.__name__} needs .* of numba, which is not there"):
        Loop(function)(np.ones(4, np.float32), 2)
