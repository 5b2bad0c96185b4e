"""How far the output is from exact arithmetic, for raymerge and for mergekit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from merges import DARE_LINEAR, DARE_TIES, LINEAR, PASSTHROUGH, SLERP, TASK_ARITHMETIC, TIES, Bench, Merge
from report import Row

FAMILY = "small"
DYADIC = (1.0, 0.5, 0.25)
"""Weights whose products are exact, so that an elected sign is no matter of rounding."""
MERGES = (
    LINEAR,
    SLERP,
    replace(TASK_ARITHMETIC, weights=(1.0, 0.6, -0.3), shared={"lambda": 0.9}),
    replace(TIES, weights=DYADIC),
    replace(DARE_LINEAR, weights=(1.0, 0.6, -0.3), densities=(1.0,) * 3),
    replace(DARE_TIES, weights=DYADIC, densities=(1.0,) * 3),
    replace(PASSTHROUGH, shared={"scale": 0.7}),
)
"""Of the random methods what is not random: density 1."""
ALLOWED = 1e-6


def measure_accuracy(bench: Bench) -> list[Row]:
    """Return a row for each dtype to compute in: the largest error beyond rounding, over all methods."""
    rows = []
    for dtype in ("bfloat16", "float32"):
        found = {merge.method: _measure_method(bench, merge, dtype) for merge in MERGES}
        rows.append(_make_row(dtype, found))
    return rows


def _measure_method(bench: Bench, merge: Merge, dtype: str) -> dict[str, Any]:
    config = bench.write_config(merge, FAMILY, dtype)
    bench.run_raymerge(config)
    found = {"raymerge": _compare(bench, merge, bench.raymerge_out)}
    if bench.mergekit:
        bench.run_mergekit(config)
        found["mergekit"] = _compare(bench, merge, bench.mergekit_out)
    return found


def _compare(bench: Bench, merge: Merge, out: Path) -> dict[str, Any]:
    """Run the comparison in a process of its own, as it needs numpy and memory."""
    script = Path(__file__).with_name("reference.py")
    inputs = merge.inputs(bench.checkpoints, FAMILY)
    command = [sys.executable, str(script), json.dumps(asdict(merge)), str(out), *map(str, inputs)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return result


def _make_row(dtype: str, found: dict[str, dict[str, Any]]) -> Row:
    worst = max(each["raymerge"]["excess"] for each in found.values())
    above = [
        method
        for method, each in found.items()
        if "mergekit" in each and each["raymerge"]["decided"]["error"] > each["mergekit"]["decided"]["error"]
    ]
    per_method = "; ".join(
        f"{method} {each['raymerge']['excess']:.1e}"
        + (f" : {each['mergekit']['decided']['excess']:.1e}" if "mergekit" in each else "")
        for method, each in found.items()
    )
    measured = f"half an ulp + {worst:.1e}" + (f"; above mergekit's: {', '.join(above)}" if above else "")
    return Row(
        f"largest error against float64, bf16 output, dtype: {dtype}",
        "at most half an ulp + 1e-6, never above mergekit's",
        measured,
        worst <= ALLOWED and not above,
        f"beyond half an ulp, relative to the largest operand, raymerge : mergekit: {per_method}",
        found,
    )
