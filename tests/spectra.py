"""Spectra with evaluations, as `sweep` and `eval` leave them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

from raymerge.pipeline.evaluation.results import Estimate, Evaluation, Tokens
from raymerge.pipeline.spectrum.record import EVALUATIONS, RECORD, Parent, Point, Spectrum

PARENTS = (Parent("instruct", "org/instruct", is_base=True), Parent("thinking", "org/thinking", is_base=False))


def make_spectrum(
    grid: Mapping[str, Sequence[object]], parents: Sequence[Parent] = PARENTS, failed: Sequence[str] = ()
) -> Spectrum:
    """Return a spectrum with a point for each combination; points whose names are in `failed` could not be made."""
    points = []
    for values in product(*grid.values()):
        settings = dict(zip(grid, values, strict=True))
        name = "_".join(f"{path}-{value}" for path, value in settings.items())
        state, error = ("failed", "no such tensor") if name in failed else ("complete", "")
        config = f"merge_method: slerp\nparameters:\n  t: {settings.get('t')}\n"
        points.append(Point(name, name, settings, config, name, state, error))  # type: ignore[arg-type]
    return Spectrum("1.0", "merge_method: slerp\n", tuple(grid), tuple(parents), tuple(points))


def make_evaluation(
    model: str,
    accuracy: float | None,
    tokens: float | None = None,
    thinking: float | None = None,
    *,
    task: str = "arithmetic",
    loss: float | None = None,
    half: float = 0.03,
    num_items: int = 200,
) -> Evaluation:
    """Return a complete evaluation, whose interval is `half` to both sides."""
    return Evaluation(
        model,
        model,
        f"digest of {model}",
        task,
        f"digest of {task}",
        {"samples": 4},
        "complete",
        "",
        num_items,
        4,
        None if accuracy is None else Estimate(accuracy, accuracy - half, accuracy + half),
        None if tokens is None else Tokens(tokens, 0.9 * tokens, 2 * tokens),
        None if loss is None else Estimate(loss, loss - half, loss + half),
        thinking,
        None if tokens is None else 0.0,
        {},
        "",
        1.0,
    )


def fail(evaluation: Evaluation, error: str) -> Evaluation:
    """Return an evaluation as it is when it failed."""
    return replace(evaluation, state="failed", error=error, accuracy=None, tokens=None, loss=None, thinking=None)


def evaluate_all(spectrum: Spectrum, tasks: Sequence[str] = ("arithmetic",)) -> list[Evaluation]:
    """Return evaluations in the shape that studies find: the share of thinking answers jumps at t = 0.5.

    Tokens fall there before they rise, and the best points beat the thinking parent.
    """
    found = []
    for index, task in enumerate(tasks):
        strengths = {point.name: _find_strength(point) for point in spectrum.points}
        strengths |= {parent.name: 1.0 if parent.name == "thinking" else 0.0 for parent in spectrum.parents}
        for name, t in strengths.items():
            share = 1 / (1 + math.exp(-30 * (t - 0.5)))
            accuracy = 0.45 + 0.3 * share + 0.15 * (t - t**6 / 2) - 0.02 * index
            tokens = (1200 + 500 * index) * (1 - 0.6 * t) + share * (2000 + 9000 * max(t - 0.4, 0) ** 1.5)
            found.append(make_evaluation(name, accuracy, tokens, share, task=task))
    return found


def _find_strength(point: Point) -> float:
    t, density = point.settings.get("t", 0.5), point.settings.get("density", 0.5)
    assert isinstance(t, float)
    return t * (0.8 + 0.4 * density) if isinstance(density, float) else t


def write_spectrum(directory: Path, spectrum: Spectrum, evaluations: Sequence[Evaluation]) -> Path:
    """Write the record and the evaluations, and return the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / RECORD).write_text(spectrum.dump())
    for each in evaluations:
        key = hashlib.sha256(f"{each.digest} {each.task_digest} {each.sampling}".encode()).hexdigest()[:8]
        file = directory / EVALUATIONS / each.model / f"{each.task.replace(':', '-')}-{key}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(each.dump())
    return directory
