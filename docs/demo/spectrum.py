"""Trains a model that answers at once and one that thinks, and finds the best of the models between them.

Usage: python docs/demo/spectrum.py DIRECTORY

Exits with 1 if the spectrum does not show what the studies of docs/spectrum.md show: more tokens and more right answers
towards the parent that thinks, and a jump of the share of answers that think.
"""

from __future__ import annotations

import csv
import itertools
import json
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from commands import run_raymerge
from reasoners import BASE, FINE_TUNES, draw_problems, train_model
from training import train_family

CONFIG = Path(__file__).resolve().with_name("spectrum.yml")
TASK = "arithmetic.yml"
NUM_PROBLEMS = 150
SAMPLES = 2
HELD_OUT_SEED = 99
METHODS = ("task_arithmetic", "ties")


@dataclass(frozen=True)
class Measured:
    """Figures of a model on the held-out problems."""

    share: float
    """Weight of the parent that thinks."""
    accuracy: float
    tokens: float
    thinking: float


def main(directory: Path) -> int:
    """Train, sweep, evaluate, draw and check; return the exit code."""
    started = time.monotonic()
    directory.mkdir(parents=True, exist_ok=True)
    print(
        "Training a base, a fine-tune that answers at once, and one that thinks and checks what it thought", flush=True
    )
    train_family(BASE, FINE_TUNES, train_model, directory)
    write_task(directory)
    run_raymerge("sweep", os.path.relpath(CONFIG, directory), "spectrum", "--overwrite", cwd=directory)
    run_raymerge("eval", "spectrum", "--task", TASK, "--batch-size", "100", cwd=directory)
    run_raymerge("curve", "spectrum", cwd=directory)
    faults = []
    parents = read_parents(directory)
    for method in METHODS:
        line = [parents["answering"], *read_points(directory, method), parents["thinking"]]
        print_line(method, line)
        faults += find_faults(method, line)
    for fault in faults:
        print(f"FAILED: {fault}")
    print(f"{time.monotonic() - started:.0f} s in all; the curve is {directory / 'spectrum' / 'curve.html'}")
    return 1 if faults else 0


def write_task(directory: Path) -> None:
    """Write the task file: problems that no model has been trained on purposely, with their answers."""
    problems = [
        {"prompt": problem.text, "answer": problem.answer} for problem in draw_problems(NUM_PROBLEMS, HELD_OUT_SEED)
    ]
    task = {
        "items": problems,
        "extract": "number",
        "check": "exact",
        "max_new_tokens": 100,
        "temperature": 0.6,
        "samples": SAMPLES,
    }
    (directory / TASK).write_text(json.dumps(task, indent=1))  # JSON is YAML


def read_points(directory: Path, method: str) -> list[Measured]:
    """Return the figures of a method's models, by the parent's share."""
    found = [
        Measured(float(row["weight[1]"]), float(row["accuracy"]), float(row["tokens"]), float(row["thinking"]))
        for row in read_rows(directory)
        if row["merge_method"] == method
    ]
    return sorted(found, key=lambda each: each.share)


def read_parents(directory: Path) -> dict[str, Measured]:
    """Return the figures of the parents, by name."""
    shares = {"answering": 0.0, "thinking": 1.0}
    return {
        row["model"]: Measured(
            shares[row["model"]], float(row["accuracy"]), float(row["tokens"]), float(row["thinking"])
        )
        for row in read_rows(directory)
        if row["model"] in shares
    }


def read_rows(directory: Path) -> Sequence[Mapping[str, str]]:
    """Return the rows of the table of the curve."""
    with (directory / "spectrum" / "curve.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def find_jump(line: Sequence[Measured]) -> tuple[Measured, float]:
    """Return the point after which the share of answers that think rises most, and by how much."""
    steps = [after.thinking - before.thinking for before, after in itertools.pairwise(line)]
    jump = max(steps)
    return line[steps.index(jump)], jump


def find_faults(method: str, line: Sequence[Measured]) -> list[str]:
    """Return the expected shapes that a line from one parent to the other lacks."""
    first, last = line[0], line[-1]
    faults = []
    if not (first.tokens < last.tokens and first.accuracy < last.accuracy):
        faults.append(f"{method}: the parent that thinks takes no more tokens, or is no better")
    _, jump = find_jump(line)
    if jump < 0.3:
        faults.append(
            f"{method}: the share of answers that think rises by {jump:.0%} at most from point to point; no jump"
        )
    return faults


def print_line(method: str, line: Sequence[Measured]) -> None:
    """Print the jump and the best points of a line from one parent to the other."""
    _, *points, last = line
    at, jump = find_jump(line)
    best = max(points, key=lambda each: (each.accuracy, -each.tokens))
    print(
        f"{method}: beyond {at.share:g}, the share of answers that think rises by {jump:.0%}; the best point is"
        f" {best.share:g}: {best.accuracy:.1%} with {best.tokens:.1f} tokens, against {last.accuracy:.1%} with"
        f" {last.tokens:.1f} of the parent that thinks"
    )
    winners = [each for each in points if each.accuracy >= last.accuracy and each.tokens < last.tokens]
    if winners:
        print(f"{method}: {len(winners)} of {len(points)} points are at least as accurate as it, with fewer tokens")
    else:
        print(f"{method}: no point is as accurate as the parent that thinks with fewer tokens")


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
