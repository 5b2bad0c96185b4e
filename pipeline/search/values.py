"""Evaluations as values of objectives."""

from __future__ import annotations

import math
from collections.abc import Sequence

from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.search.study import Direction

Values = tuple[float, ...]
"""A number for each objective."""
UNMEASURED = "a task does not measure an objective, or it is no finite number"
"""The error of a model that was evaluated, and has no values all the same."""


def read_values(evaluations: Sequence[Evaluation], directions: Sequence[Direction]) -> Values | None:
    """Return a value for each objective, the mean over tasks; None where a task failed or does not measure it."""
    values = []
    for direction in directions:
        found = [read_figure(evaluation, direction.name) for evaluation in evaluations]
        known = [value for value in found if value is not None and math.isfinite(value)]
        if not known or len(known) < len(found):
            return None
        values.append(math.fsum(known) / len(known))
    return tuple(values)


def read_figure(evaluation: Evaluation, name: str) -> float | None:
    """Return a figure of an evaluation by its name; None where it has none."""
    if evaluation.state == "failed":
        return None
    figures = {
        "accuracy": evaluation.accuracy.mean if evaluation.accuracy else None,
        "tokens": evaluation.tokens.mean if evaluation.tokens else None,
        "loss": evaluation.loss.mean if evaluation.loss else None,
        "thinking": evaluation.thinking,
        "cut_off": evaluation.cut_off,
    }
    return figures[name] if name in figures else evaluation.other.get(name)


def explain_failure(evaluations: Sequence[Evaluation]) -> str:
    """Return why evaluations come to no values."""
    failed = [f"{evaluation.task}: {evaluation.error}" for evaluation in evaluations if evaluation.error]
    return "; ".join(failed) or UNMEASURED
