"""Rows of the table, as markdown and as JSON."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure: what was asked for, and what came out."""

    name: str
    asked: str
    measured: str
    is_met: bool | None
    """None where nothing was asked, or nothing could be compared."""
    how: str
    """Both numbers, and of how many runs."""
    data: dict[str, Any] = field(default_factory=dict)
    """Every single measurement, for the JSON."""


def to_markdown(rows: Sequence[Row]) -> str:
    """Return the table.

    >>> print(to_markdown([Row("help", "0.5 s", "0.7 s", False, "median of 5")]))
    | | asked | measured | how |
    |---|---|---|---|
    | help | 0.5 s | 0.7 s (missed) | median of 5 |
    """
    lines = ["| | asked | measured | how |", "|---|---|---|---|"]
    for row in rows:
        measured = row.measured + (" (missed)" if row.is_met is False else "")
        cells = (row.name, row.asked, measured, row.how)
        lines.append("| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in cells) + " |")
    return "\n".join(lines)


def write_json(path: Path, benchmark: str, rows: Sequence[Row]) -> None:
    """Write one benchmark's rows and the machine; what the file holds of other benchmarks stays."""
    old: dict[str, Any] = json.loads(path.read_text()).get("benchmarks", {}) if path.exists() else {}
    content = {"machine": describe_machine(), "benchmarks": old | {benchmark: [asdict(row) for row in rows]}}
    path.write_text(json.dumps(content, indent=2) + "\n")


def describe_machine() -> dict[str, str]:
    """Return the processor, the number of cores, the memory and the system."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in cpuinfo if line.startswith("model name")]
    memory = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))
    return {
        "processor": models[0] if models else platform.machine(),
        "cores": f"{len(models) or os.cpu_count()} cores",
        "memory": f"{int(memory.split()[1]) / 2**20:.0f} GiB",
        "system": f"{platform.system()} {platform.release()}",
    }


def gib(nbytes: float) -> str:
    """Return a size for people.

    >>> gib(3 * 2**29)
    '1.50 GiB'
    """
    return f"{nbytes / 2**30:.2f} GiB"
