from __future__ import annotations

from dataclasses import replace
from math import sqrt

import pytest

from raymerge.pipeline.curve.tasks import choose_tasks, sort_evaluations
from raymerge.pipeline.curve.types import View
from raymerge.pipeline.curve.views import list_models, make_views
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.results import Estimate, Evaluation, Tokens
from tests.spectra import fail, make_evaluation, make_spectrum

SPECTRUM = make_spectrum({"t": [0.1, 0.2, 0.3]}, failed=["t-0.3"])
NAN = float("nan")


def view_all(*evaluations: Evaluation) -> tuple[View, ...]:
    tasks, _ = sort_evaluations(evaluations)
    return make_views(list_models("spectrum", SPECTRUM, evaluations), tasks)


def test_the_mean_over_tasks_is_of_models_with_all_of_them() -> None:
    mean, first, second = view_all(
        make_evaluation("t-0.1", 0.6, 100, 0.2, task="a", half=0.03),
        make_evaluation("t-0.1", 0.8, 300, 0.4, task="b", half=0.04),
        make_evaluation("t-0.2", 0.9, 100, task="a"),
        make_evaluation("thinking", 0.9, 100, task="a"),
        fail(make_evaluation("thinking", 0.9, 100, task="b"), "out of memory"),
    )
    assert (mean.title, mean.tasks, first.title, second.title) == ("Mean over 2 tasks", ("a", "b"), "a", "b")
    assert list(mean.scores) == ["t-0.1"]
    score = mean.scores["t-0.1"]
    half = sqrt(0.03**2 + 0.04**2) / 2
    assert score.accuracy is not None
    assert (score.accuracy.low, score.accuracy.high) == pytest.approx((0.7 - half, 0.7 + half))
    assert (score.tokens, score.median_tokens) == (200.0, None)
    assert score.thinking == pytest.approx(0.3)
    assert score.num_items == 400
    assert mean.gaps == {
        "t-0.2": "incomplete, 1 of 2 tasks; b: not evaluated",
        "t-0.3": "could not be made: no such tensor",
        "instruct": "not evaluated",
        "thinking": "incomplete, 1 of 2 tasks; b: failed: out of memory",
    }
    assert list(first.scores) == ["t-0.1", "t-0.2", "thinking"]


def test_tokens_are_averaged_over_the_tasks_that_count_them() -> None:
    mean, *_ = view_all(
        make_evaluation("t-0.1", 0.6, 100, task="a"),
        make_evaluation("t-0.1", 0.8, task="b"),
        make_evaluation("t-0.2", 0.6, task="a"),
        make_evaluation("t-0.2", 0.8, task="b"),
    )
    assert [score.tokens for score in mean.scores.values()] == [100.0, None]


def test_a_task_without_accuracy_is_shown_by_its_loss_and_in_no_mean() -> None:
    views = view_all(make_evaluation("t-0.1", None, loss=2.5, task="text"), make_evaluation("t-0.1", 0.5, task="a"))
    assert [(view.title, view.measure) for view in views] == [("a", "accuracy"), ("text", "loss")]
    assert views[1].quality("t-0.1") == -2.5


def test_figures_that_are_not_finite_do_not_count() -> None:
    lame = replace(
        make_evaluation("t-0.1", 0.5),
        accuracy=Estimate(0.5, NAN, float("inf")),
        tokens=Tokens(NAN, 1.0, 2.0),
        thinking=NAN,
    )
    (view,) = view_all(lame, replace(make_evaluation("t-0.2", 0.5), accuracy=Estimate(NAN, NAN, NAN)))
    score = view.scores["t-0.1"]
    assert (score.accuracy, score.tokens, score.median_tokens, score.thinking) == (
        Estimate(0.5, 0.5, 0.5),
        None,
        1.0,
        None,
    )
    assert view.gaps["t-0.2"] == "its accuracy is missing or not finite"


def test_other_models_are_listed_last() -> None:
    models = list_models("spectrum", SPECTRUM, [make_evaluation("rival", 0.5), make_evaluation("t-0.1", 0.5)])
    assert [(model.name, model.kind) for model in models[-3:]] == [
        ("instruct", "parent"),
        ("thinking", "parent"),
        ("rival", "other"),
    ]


def test_models_are_compared_by_the_same_items_and_sampling() -> None:
    few = [replace(make_evaluation("t-0.1", 0.4), sampling={"samples": 1, "temperature": 0.6})]
    many = [
        replace(make_evaluation(name, 0.5), sampling={"samples": 8, "temperature": 0.6}, num_samples=8)
        for name in ("t-0.1", "t-0.2")
    ]
    tasks, _ = sort_evaluations([*few, *many])
    assert choose_tasks(tasks, ()).notes == (), "all of its models are in the other one"
    few.append(replace(make_evaluation("instruct", 0.4), sampling={"samples": 1, "temperature": 0.6}))
    tasks, _ = sort_evaluations([*few, *many])
    assert [task.label for task in tasks] == ["arithmetic (samples 1)", "arithmetic (samples 8)"]
    chosen = choose_tasks(tasks, ())
    assert [task.label for task in chosen.chosen] == ["arithmetic (samples 8)"]
    (note,) = chosen.notes
    assert "arithmetic (samples 1) is left out (2 models)" in note
    assert [task.label for task in choose_tasks(tasks, ["arithmetic (samples 1)"]).chosen] == ["arithmetic (samples 1)"]
    assert choose_tasks(tasks, ["arithmetic"]).chosen == chosen.chosen
    with pytest.raises(
        ConfigError, match="no model was evaluated in the task 'arithmetics'; did you mean 'arithmetic'"
    ):
        choose_tasks(tasks, ["arithmetics"])


def test_a_model_that_changed_is_told_of() -> None:
    old, new = make_evaluation("t-0.1", 0.4), replace(make_evaluation("t-0.1", 0.5), digest="another")
    (task,), (note,) = sort_evaluations([old, new])
    assert task.results["t-0.1"] == new
    assert "t-0.1 was evaluated as 2 different models (another, digest of t-)" in note
    (task,), _ = sort_evaluations([old, fail(new, "died")])
    assert task.results["t-0.1"] == old, "a complete one counts"
