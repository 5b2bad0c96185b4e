"""Time of each phase of a merge on one core, in ns for each element of the output; compiled loops against torch."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from merges import DARE_TIES, LINEAR, SLERP, TASK_ARITHMETIC, TIES, Bench
from report import Row

NUM_ELEMENTS = 16 * 2**20
_SECONDS = 1e9 / NUM_ELEMENTS
"""From seconds for all elements to ns for each."""


def measure_phases(bench: Bench) -> list[Row]:
    """Return a row for each method: what reading, measuring, combining, hashing and writing take."""
    rows = []
    for merge in (LINEAR, TASK_ARITHMETIC, SLERP, TIES, DARE_TIES):
        what = json.dumps([merge.method, merge.weights, merge.densities, merge.num_tunes])
        done = subprocess.run([sys.executable, __file__, what], check=True, capture_output=True)
        found: dict[str, float] = json.loads(done.stdout)
        torch_total = found.pop("torch")
        phases = ", ".join(f"{phase} {ns:.2f}" for phase, ns in found.items())
        arithmetic = sum(ns for name, ns in found.items() if name.startswith(("measure", "combine")))
        name = f"ns per element on one core, {merge.method}, {_count_sources(merge.method, merge.num_tunes)} sources"
        how = f"{phases}; measured and combined by torch {torch_total:.2f}, 1 : {torch_total / arithmetic:.1f}"
        rows.append(Row(name, "", f"{arithmetic:.2f} of {sum(found.values()):.2f}", None, how, found))
    return rows


def main() -> None:
    """Measure one method in this process, and print its phases as JSON."""
    method, weights, densities, num_tunes = json.loads(sys.argv[1])
    parameters: dict[str, Any] = {"weight": tuple(weights)} if weights else {"t": 0.5}
    if densities:
        parameters["density"] = tuple(densities)
    print(json.dumps(_measure(method, parameters, _count_sources(method, num_tunes))))


def _count_sources(method: str, num_tunes: int) -> int:
    return num_tunes + (method != "linear")


def _measure(method: str, parameters: dict[str, Any], num_sources: int) -> dict[str, float]:
    import numpy as np
    import torch

    from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Site
    from raymerge.ops.registry import find_op
    from raymerge.ops.stored import STRIP, Slot, Stored
    from raymerge.pipeline.engine.threads import run_in_turn

    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(NUM_ELEMENTS, generator=generator) * 0.02
    noise = [torch.randn(NUM_ELEMENTS, generator=generator) * 0.001 for _ in range(num_sources - 1)]
    tensors = [base.bfloat16(), *((base + each).bfloat16() for each in noise)]
    kernel = find_op(method).kernel(parameters)
    site = Site("weight", (NUM_ELEMENTS,), num_sources, 0)
    content = bytearray(b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in tensors))
    out = memoryview(bytearray(2 * NUM_ELEMENTS))
    offsets = tuple(range(0, len(content), 2 * NUM_ELEMENTS))
    stored = Stored(0, NUM_ELEMENTS, memoryview(content), offsets, ("bfloat16",) * num_sources)
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "file"
        path.write_bytes(content)
        file = os.open(path, os.O_RDWR)
        found["read"] = _time(lambda: os.preadv(file, [content], 0))
        for run in [kernel.start(site) for _ in range(2)]:  # the first one has loops compiled or loaded
            for index in range(kernel.num_passes(site)):
                call = partial(run.measure_stored, index, stored, run_in_turn)
                found[f"measure {index + 1}"] = _time(call, repeats=1)
                run.end_pass(index)
        slot = Slot(out, "bfloat16", np.zeros(STRIP, np.float32))
        found["combine"] = _time(lambda: run.combine_stored(stored, slot))
        found["hash"] = _time(lambda: hashlib.sha256(out).digest())
        found["write"] = _time(lambda: os.pwrite(file, out, 0))
        os.close(file)
    blocks = kernel.start(site)
    scratch = torch.empty(kernel.num_scratch(site) + 1, BLOCK_ELEMENTS)
    result = torch.empty(BLOCK_ELEMENTS, dtype=torch.bfloat16)

    class Piece(Block):
        def __init__(self, start: int) -> None:
            self.start, self.stop, self.scratch = start, start + BLOCK_ELEMENTS, list(scratch[1:])

        def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
            return out.copy_(tensors[source][self.start : self.stop])

    def merge() -> None:
        starts = range(0, NUM_ELEMENTS, BLOCK_ELEMENTS)
        for index in range(kernel.num_passes(site)):
            for start in starts:
                blocks.measure(index, Piece(start))
            blocks.end_pass(index)
        for start in starts:
            blocks.combine(Piece(start), scratch[0])
            result.copy_(scratch[0])

    found["torch"] = _time(merge, repeats=1)
    return found


def _time(call: Callable[[], object], repeats: int = 5) -> float:
    """Return the least processor time of a call, in ns for each element: all is in memory, and others may be busy."""
    least = float("inf")
    for _ in range(repeats):
        start = time.thread_time()
        call()
        least = min(least, time.thread_time() - start)
    return least * _SECONDS


if __name__ == "__main__":
    main()
