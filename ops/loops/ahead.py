"""Compiles loops in processes of their own, before they are needed; whoever needs them meanwhile waits for the files.

Nothing depends on it: a loop that has not come about this way is compiled where it is first called.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from raymerge.ops.loops.code_files import CodeFile
from raymerge.ops.loops.compiler import Loop

_MAX_PROCESSES = 4
"""Each takes some 150 MiB, most of it shared, and the longest loop takes as long as all others together."""

_SET_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""

_COMMAND = "import sys; sys.path[:] = sys.argv.pop().split('\\n'); from raymerge.ops.loops.ahead import main; main()"


@dataclass(frozen=True, slots=True)
class Compiling:
    """Processes that compile loops, which may end at any time."""

    process: subprocess.Popen[bytes]
    """Leader of their process group."""

    def close(self) -> None:
        """End them, whatever they are doing; what is compiled is kept."""
        with suppress(OSError):  # they have ended
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def compile_ahead(loops: Iterable[Loop], num_cores: int) -> Compiling | None:
    """Start compiling the loops that are not in the cache, except those that another process is compiling.

    Args:
        loops: any.
        num_cores: that may be used.

    Returns:
        The processes, to be closed; None where there is nothing to do, or what they compile could not be kept.
    """
    locks: dict[str, tuple[CodeFile, int]] = {}
    try:
        for loop in loops:
            file = loop.find_file()
            if file is not None and not file.exists() and (lock := file.try_lock()) is not None:
                locks[loop.name] = file, lock
        return _start(locks, num_cores) if locks else None
    except Exception:  # no llvmlite, no directory, no locks, no processes: told by whoever needs the loops
        return None
    finally:
        for _, lock in locks.values():
            os.close(lock)  # the processes have it now


def _start(locks: Mapping[str, tuple[CodeFile, int]], num_cores: int) -> Compiling:
    num_processes = min(num_cores, max(1, len(locks) - 1), _MAX_PROCESSES)
    arguments = [str(num_processes), *(f"{name}:{lock}" for name, (_, lock) in locks.items())]
    process = subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *arguments, "\n".join(sys.path)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},  # nothing to fork beside
        pass_fds=[lock for _, lock in locks.values()],
        process_group=0,
    )
    return Compiling(process)


def main() -> None:
    """Compile the loops of the command line: a number of processes, then `module:function:lock` for each loop."""
    _end_with_parent()
    num_processes = int(sys.argv[1])
    tasks = []
    for argument in sys.argv[2:]:
        module, name, lock = argument.split(":")
        loop = vars(importlib.import_module(module))[name]
        assert isinstance(loop, Loop)
        tasks.append((loop, int(lock)))
    smallest, *others = sorted(tasks, key=lambda task: task[0].num_instructions)
    _compile(*smallest)  # once for all processes: importing numba, and what loops share
    tasks = others[::-1]
    taken, given = os.pipe()
    os.write(given, bytes(range(len(tasks))))
    os.close(given)
    children = []
    for _ in range(num_processes - 1):
        child = os.fork()
        if not child:
            _end_with_parent()
            _work_off(tasks, taken)
            os._exit(0)
        children.append(child)
    _work_off(tasks, taken)
    for child in children:
        os.waitpid(child, 0)


def _end_with_parent() -> None:
    """Have this process killed when its parent ends, however that may be; on Linux."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)


def _work_off(tasks: Sequence[tuple[Loop, int]], taken: int) -> None:
    """Compile loops, taking their numbers from a pipe, until it is empty."""
    while number := os.read(taken, 1):
        _compile(*tasks[number[0]])


def _compile(loop: Loop, lock: int) -> None:
    file = loop.find_file()
    assert file is not None
    with suppress(Exception):  # raised again, and told, by whoever needs the loop
        loop.compile_to(file)
    file.unlock(lock)
