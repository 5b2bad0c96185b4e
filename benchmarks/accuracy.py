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
DTYPES = ("float32", "bfloat16")
"""The config's `dtype`: mergekit computes in it, raymerge in float32 either way."""


def measure_accuracy(bench: Bench) -> list[Row]:
    """Return the largest errors over all methods, relative to the operands and relative to the result."""
    found = {dtype: {merge.method: _measure_method(bench, merge, dtype) for merge in MERGES} for dtype in DTYPES}
    return [
        _make_row("relative to the largest operand", found, "error", "excess"),
        _make_row("relative to the result", found, "error_of_result", "excess_of_result"),
    ]


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


def _make_row(name: str, found: dict[str, dict[str, dict[str, Any]]], error: str, excess: str) -> Row:
    worst = max(each["raymerge"][excess] for methods in found.values() for each in methods.values())
    errors_above = _above_mergekit(found, error)
    excesses_above = _above_mergekit(found, excess)
    measured = f"half an ulp + {worst:.1e}"
    has_peer = all("mergekit" in each for methods in found.values() for each in methods.values())
    if has_peer:
        measured += f"; error above mergekit's: {', '.join(errors_above) or 'none'}"
    if excesses_above:
        measured += f"; what exceeds half an ulp above mergekit's: {', '.join(excesses_above)}"
    how = []
    for method in found[DTYPES[0]]:
        figures = [max(found[dtype][method]["raymerge"][excess] for dtype in DTYPES)]
        if has_peer:
            figures += [found[dtype][method]["mergekit"]["decided"][excess] for dtype in DTYPES]
        how.append(f"{method} " + " : ".join(f"{figure:.1e}" for figure in figures))
    return Row(
        f"largest error against float64, bf16 output, {name}",
        "at most half an ulp + 1e-6, never above mergekit's",
        measured,
        worst <= ALLOWED and not errors_above,
        "beyond half an ulp, raymerge"
        + (f" : mergekit with dtype {' : with '.join(DTYPES)}" if has_peer else "")
        + f": {'; '.join(how)}",
        found,
    )


def _above_mergekit(found: dict[str, dict[str, dict[str, Any]]], figure: str) -> list[str]:
    """Return where raymerge's figure is above mergekit's, and by how much."""
    return [
        f"{method} ({dtype}) by {difference:.1e}"
        for dtype, methods in found.items()
        for method, each in methods.items()
        if "mergekit" in each
        and (difference := each["raymerge"]["decided"][figure] - each["mergekit"]["decided"][figure]) > 0
    ]
