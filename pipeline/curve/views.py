"""From a spectrum and its evaluations to the scores of each model, task by task and in the mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import sqrt

from raymerge.pipeline.curve.tasks import Task
from raymerge.pipeline.curve.types import Measure, Model, Score, View, number
from raymerge.pipeline.evaluation.results import Estimate, Evaluation
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.spectrum.record import Spectrum, locate_point

_LINE = "\n"
_NOT_EVALUATED = "not evaluated"


def list_models(directory: str, spectrum: Spectrum, evaluations: Sequence[Evaluation]) -> tuple[Model, ...]:
    """Return the points by their values, the parents, and whatever else was evaluated beside them."""
    points = [
        Model(
            point.name,
            "point",
            locate_point(directory, point),
            point.settings,
            point.config,
            point.error,
            is_made=point.state == "complete",
        )
        for point in spectrum.sorted_points
    ]
    parents = [Model(parent.name, "parent", parent.model, {}, "", "") for parent in spectrum.parents]
    known = {model.name for model in (*points, *parents)}
    others = {each.model: Model(each.model, "other", each.url, {}, "", "") for each in evaluations}
    return (*points, *parents, *(others[name] for name in sorted(others) if name not in known))


def make_views(models: Sequence[Model], tasks: Sequence[Task]) -> tuple[View, ...]:
    """Return the mean over the tasks with an accuracy, if there are several, and then each task."""
    views = [_view_task(models, task) for task in tasks]
    measured = [view for view in views if view.measure == "accuracy"]
    return (_average(models, measured), *views) if len(measured) > 1 else tuple(views)


def make_score(evaluation: Evaluation) -> Score:
    """Return what an evaluation found."""
    tokens = evaluation.tokens
    return Score(
        accuracy=_check(evaluation.accuracy),
        loss=_check(evaluation.loss),
        tokens=number(tokens.mean) if tokens else None,
        tokens_low=number(tokens.low) if tokens else None,
        tokens_high=number(tokens.high) if tokens else None,
        median_tokens=number(tokens.median) if tokens else None,
        p95_tokens=number(tokens.p95) if tokens else None,
        thinking=number(evaluation.thinking),
        cut_off=number(evaluation.cut_off),
        num_items=evaluation.num_items,
    )


def _view_task(models: Sequence[Model], task: Task) -> View:
    found = {name: make_score(each) for name, each in task.results.items() if each.state == "complete"}
    measure: Measure = "loss" if found and all(score.accuracy is None for score in found.values()) else "accuracy"
    scores: dict[str, Score] = {}
    gaps: dict[str, str] = {}
    for model in models:
        result = task.results.get(model.name)
        if result is None:
            gaps[model.name] = f"could not be made: {model.error}" if model.error else _NOT_EVALUATED
        elif result.state == "failed":
            gaps[model.name] = f"failed: {result.error.partition(_LINE)[0]}"
        elif found[model.name].get(measure) is None:
            gaps[model.name] = f"its {measure} is missing or not finite"
        else:
            scores[model.name] = found[model.name]
    return View(task.label, (task.label,), measure, scores, gaps)


def _average(models: Sequence[Model], views: Sequence[View]) -> View:
    """Return the mean over tasks, of the models that have a score in each."""
    scores: dict[str, Score] = {}
    gaps: dict[str, str] = {}
    for model in models:
        missing = [view for view in views if model.name not in view.scores]
        if not missing:
            scores[model.name] = average_scores([view.scores[model.name] for view in views], _list_counted(views))
        elif len(missing) == len(views) and len({view.gaps[model.name] for view in missing}) == 1:
            gaps[model.name] = missing[0].gaps[model.name]
        else:
            reasons = listing((f"{view.title}: {view.gaps[model.name]}" for view in missing), separator="; ")
            gaps[model.name] = f"incomplete, {len(views) - len(missing)} of {counted(len(views), 'task')}; {reasons}"
    return View(f"Mean over {len(views)} tasks", tuple(view.title for view in views), "accuracy", scores, gaps)


def _list_counted(views: Sequence[View]) -> dict[str, list[int]]:
    """Return for each figure the tasks in which any model has it: evaluators differ in what they count."""
    return {
        name: [
            index
            for index, view in enumerate(views)
            if any(getattr(score, name) is not None for score in view.scores.values())
        ]
        for name in ("tokens", "thinking", "cut_off")
    }


def average_scores(scores: Sequence[Score], counted_in: Mapping[str, Sequence[int]]) -> Score:
    """Return the unweighted mean of a model's scores in several tasks.

    The interval's half-widths are sqrt(sum h_i^2) / n on either side, as the tasks are independent samples; it is known
    where that of each task is. A figure
    that one of its tasks lacks is None; medians and percentiles have no mean.

    Args:
        scores: of each task, with an accuracy.
        counted_in: for `tokens`, `thinking` and `cut_off` the numbers of the tasks that have it.
    """

    def mean(name: str) -> float | None:
        values = [getattr(scores[index], name) for index in counted_in[name]]
        return sum(values) / len(values) if values and None not in values else None

    estimates = [score.accuracy for score in scores if score.accuracy is not None]
    centre = sum(each.mean for each in estimates) / len(estimates)
    if not all(each.has_interval for each in estimates):
        estimates = [Estimate(each.mean, each.mean, each.mean) for each in estimates]
    below = sqrt(sum((each.mean - each.low) ** 2 for each in estimates)) / len(estimates)
    above = sqrt(sum((each.high - each.mean) ** 2 for each in estimates)) / len(estimates)
    return Score(
        accuracy=Estimate(centre, centre - below, centre + above),
        tokens=mean("tokens"),
        thinking=mean("thinking"),
        cut_off=mean("cut_off"),
        num_items=sum(score.num_items for score in scores),
    )


def _check(estimate: Estimate | None) -> Estimate | None:
    """Return an estimate of finite numbers; an interval that is not finite, or elsewhere, shrinks to the mean."""
    if estimate is None or number(estimate.mean) is None:
        return None
    low, high = number(estimate.low), number(estimate.high)
    mean = estimate.mean
    return Estimate(mean, mean if low is None else min(low, mean), mean if high is None else max(high, mean))
