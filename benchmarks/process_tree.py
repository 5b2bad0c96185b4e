"""Run a command and wait for all that it leaves behind, so that what the whole tree has cost is counted.

`python -I -S benchmarks/process_tree.py RESULT DIRECTORY MAX_NBYTES COMMAND...` runs it in DIRECTORY, forbids it files
of more than MAX_NBYTES, and writes to RESULT what the kernel has counted of its processes: bytes written to disks and
read from them, and bytes that were read through system calls, of the page cache among them (`rchar`). A fork server
outlives the process that has started it: nobody but init would be told what it has used.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36


def main(result: str, directory: str, max_nbytes: str, *command: str) -> int:
    """Return the command's exit code."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        os.chdir(directory)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(max_nbytes), int(max_nbytes)))
        os.execvp(command[0], command)
    status = 0
    with suppress(ChildProcessError):
        while True:
            ended, ended_status = os.wait()
            if ended == pid:
                status = ended_status
    lines = Path("/proc/self/io").read_text().splitlines()  # of children, too, once they are waited for
    counts = dict(line.split(": ") for line in lines)
    Path(result).write_text(json.dumps({name: int(counts[name]) for name in ("write_bytes", "read_bytes", "rchar")}))
    return os.waitstatus_to_exitcode(status)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
