"""How often the inputs of merges that measure before they combine are read, as the kernel counts it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merges import DARE_TIES, SLERP, TIES, Bench, Merge, weights
from processes import Usage
from report import Row
from speed import FAMILY
from store_servers import run

MERGES = (SLERP, TIES, DARE_TIES)
LARGE_PLANS = (("128GiB", 1.0), ("8GiB", 1.1))
"""Memory for 16 workers and 70 B parameters, and what may be read for each byte of the inputs."""
GENEROUS = ("--memory", "16GiB", "--workers", "8")
"""For each worker that has work, the sources of the largest tensor: 1 GiB for four models."""
SCARCE = ("--memory", "1280MiB", "--workers", "8")
"""Those sources once, as 8 GiB hold them once for four models of 70 B parameters."""
TOLERANCE = 0.005


def measure_bytes_read(bench: Bench) -> list[Row]:
    """Return how many bytes are read for each byte of the inputs: planned for large models, counted for small ones."""
    rows = [_plan_large(bench, memory, at_most) for memory, at_most in LARGE_PLANS]
    for merge in MERGES:
        rows += [_count_calls(bench, merge), _count_disk(bench, merge)]
    return rows


def _plan_large(bench: Bench, memory: str, at_most: float) -> Row:
    plans = {
        merge.method: bench.plan(bench.write_config(merge, "llama-70b"), "--memory", memory, "--workers", "16")
        for merge in MERGES
    }
    ratios = {method: planned_nbytes(plan) / plan["read_nbytes"] for method, plan in plans.items()}
    return Row(
        f"bytes read : inputs, plan of 70 B parameters × 4, --memory {memory} --workers 16",
        f"at most {at_most:.2f}",
        ", ".join(f"{method} {ratio:.2f}" for method, ratio in ratios.items()),
        all(ratio <= at_most + TOLERANCE for ratio in ratios.values()),
        "; ".join(f"{method} {plan['read_nbytes'] / 1e9:.0f} GB" for method, plan in plans.items()) + "; slerp is of 2",
        {method: {"read": plan["read_nbytes"], "again": plan["reread_nbytes"]} for method, plan in plans.items()},
    )


def _count_calls(bench: Bench, merge: Merge) -> Row:
    """Count what system calls read, of which a merge of a tiny model tells what the interpreter takes."""
    config, tiny = bench.write_config(merge, FAMILY), bench.write_config(merge, "tiny")
    plan = bench.plan(config, *GENEROUS)
    _, start_up = _merge_counted(bench, tiny, GENEROUS)
    usage, counts = _merge_counted(bench, config, GENEROUS)
    return _make_row(
        bench,
        merge,
        plan,
        counts["rchar"] - start_up["rchar"],
        f"local, much memory ({' '.join(GENEROUS)})",
        1.0,
        f"by system calls: rchar of the process tree, less {start_up['rchar'] / 1e6:.0f} MB of a tiny merge;"
        f" {usage.wall:.1f} s wall",
    )


def _count_disk(bench: Bench, merge: Merge) -> Row:
    """Count what comes from the disk where the memory is scarce, but the page cache holds what was read once."""
    config = bench.write_config(merge, FAMILY)
    plan = bench.plan(config, *SCARCE)
    bench.cool(merge.inputs(bench.checkpoints, FAMILY))
    usage, counts = _merge_counted(bench, config, SCARCE)
    return _make_row(
        bench,
        merge,
        plan,
        counts["read_bytes"],
        f"local, little memory ({' '.join(SCARCE)}), from the disk",
        1.1,
        f"read_bytes of the process tree, page cache cold at the start; {counts['rchar']:,} by system calls, most of"
        f" which the page cache serves; {usage.wall:.1f} s wall",
    )


def _merge_counted(bench: Bench, config: Path, options: Sequence[str]) -> tuple[Usage, dict[str, int]]:
    """Merge, and return what it cost and what the kernel has counted of all of its processes."""
    bench.clear(bench.raymerge_out)
    command: list[str | Path] = [bench.raymerge, "merge", config, bench.raymerge_out, "-q", *options]
    usage = run(bench, command, log="raymerge", env={}, directory=bench.workdir)
    bench.clear(bench.raymerge_out)
    counts: dict[str, int] = json.loads((bench.workdir / "tree.json").read_text())
    return usage, counts


def _make_row(
    bench: Bench, merge: Merge, plan: dict[str, Any], counted: int, where: str, at_most: float, how: str
) -> Row:
    nbytes = sum(file.stat().st_size for file in weights(merge.inputs(bench.checkpoints, FAMILY)))
    return Row(
        f"bytes read : inputs, {merge.method}, {where}",
        f"at most {at_most:.2f}",
        f"{counted / nbytes:.3f}",
        counted <= (at_most + TOLERANCE) * nbytes,
        f"{counted:,} of {nbytes:,} bytes, planned {planned_nbytes(plan):,}; {how}",
        {"counted": counted, "planned": planned_nbytes(plan), "stored": nbytes},
    )


def planned_nbytes(plan: dict[str, Any]) -> int:
    """Return the bytes that a plan expects to be read, again where it must."""
    again: int = plan["reread_nbytes"]
    return again + int(plan["read_nbytes"])
