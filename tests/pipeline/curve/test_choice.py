from __future__ import annotations

from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.curve.choice import Choice, Rule, choose
from raymerge.pipeline.curve.findings import find
from raymerge.pipeline.curve.sentences import describe_choice, describe_findings
from raymerge.pipeline.curve.types import Measure, Model, Score, View
from raymerge.pipeline.curve.views import average_scores
from raymerge.pipeline.evaluation.results import Estimate

Figures = tuple[float, float | None]
"""Accuracy in percent, and tokens."""


def make_view(figures: Mapping[str, Figures], half: float = 2.0, measure: Measure = "accuracy") -> View:
    scores = {}
    for name, (mean, tokens) in figures.items():
        estimate = Estimate(mean / 100, (mean - half) / 100, (mean + half) / 100)
        scores[name] = Score(tokens=tokens, accuracy=estimate) if measure == "accuracy" else Score(loss=estimate)
    return View("task", ("task",), measure, scores, {})


def pick(figures: Mapping[str, Figures], rule: Rule, half: float = 2.0) -> Choice:
    """Choose among the points; parents are those whose names are capitals."""
    points, parents = ([name for name in figures if name.isupper() == is_parent] for is_parent in (False, True))
    choice = choose(make_view(figures, half), points, parents, rule)
    assert choice is not None
    return choice


def test_within_takes_the_fewest_tokens_near_the_better_parent() -> None:
    figures = {"a": (60.0, 10), "b": (79.5, 20), "c": (82.0, 30), "A": (50.0, 5), "B": (80.0, 90)}
    choice = pick(figures, Rule("within", 1.0))
    assert (choice.model, choice.is_met, choice.reference, choice.is_told_apart) == ("b", True, "B", False)
    assert not choice.is_sure, "its interval reaches down to 77.5%"
    assert choice.parents == (), "B takes more tokens"
    assert pick(figures, Rule("within", 0.0)).model == "c"
    assert pick(figures, Rule("within", 30.0)).model == "a"


def test_a_limit_is_met_by_its_own_value() -> None:
    assert pick({"a": (79.0, 10), "b": (85.0, 20), "B": (80.0, 30)}, Rule("within", 1.0)).model == "a"


def test_within_names_the_nearest_where_none_is_near_enough() -> None:
    choice = pick({"a": (60.0, 10), "b": (70.0, 20), "B": (80.0, 90)}, Rule("within", 1.0), half=9.5)
    assert (choice.model, choice.is_met) == ("b", False)
    assert choice.parents == ("B",)
    assert choice.contenders == (), "none but the nearest reaches 79%"


def test_within_names_cheaper_points_whose_intervals_reach_the_limit() -> None:
    figures = {"a": (70.0, 5), "b": (78.0, 10), "c": (81.0, 20), "d": (78.0, 30), "B": (80.0, 90)}
    assert pick(figures, Rule("within", 1.0)).contenders == ("b",)


def test_within_goes_by_the_best_point_without_parents() -> None:
    choice = pick({"a": (79.5, 10), "b": (80.0, 20)}, Rule("within", 1.0))
    assert (choice.model, choice.reference, choice.has_parents) == ("a", "b", False)
    said = " ".join(describe_choice(make_view({"a": (79.5, 10), "b": (80.0, 20)}), choice))
    assert "within 1 point of the most accurate point (no parent was evaluated), b with 80.0%" in said


def test_the_best_point_of_all_cannot_miss_a_rule_that_goes_by_itself() -> None:
    figures: dict[str, Figures] = {"a": (60.0, 10), "b": (80.0, 20)}
    choice = pick(figures, Rule("within", 1.0))
    assert (choice.model, choice.reference, choice.is_sure) == ("b", "b", True)
    assert "may miss the rule" not in " ".join(describe_choice(make_view(figures), choice))


def test_points_with_the_same_figures_are_named() -> None:
    figures: dict[str, Figures] = {"a": (80.0, 1), "b": (80.0, 1), "c": (80.0, 2), "d": (80.0, 1), "B": (80.0, 1)}
    choice = pick(figures, Rule("within", 1.0))
    assert (choice.model, choice.ties) == ("a", ("b", "d"))
    said = " ".join(describe_choice(make_view(figures), choice))
    assert "a: 80.0% (78.0 to 82.0) at 1 token, in task. Other points with the same figures: b, d." in said


def test_many_more_tokens_are_said_as_a_multiple() -> None:
    figures: dict[str, Figures] = {"a": (80.0, 33), "B": (80.0, 2)}
    said = " ".join(describe_choice(make_view(figures), pick(figures, Rule("within", 1.0))))
    assert "; a takes 16.5 times as many tokens." in said


def test_a_parent_that_does_as_well_is_named() -> None:
    choice = pick({"a": (81.0, 10), "A": (80.5, 10), "B": (80.0, 90)}, Rule("within", 1.0))
    assert (choice.model, choice.reference, choice.parents) == ("a", "A", ("A",))


def test_best_under_tokens() -> None:
    figures = {"a": (60.0, 10), "b": (70.0, 20), "c": (69.0, 15), "d": (90.0, 30), "A": (75.0, 20)}
    choice = pick(figures, Rule("best_under_tokens", 20))
    assert (choice.model, choice.is_met, choice.contenders, choice.parents) == ("b", True, ("c",), ("A",))
    choice = pick(figures, Rule("best_under_tokens", 5))
    assert (choice.model, choice.is_met) == ("a", False)


def test_best_needs_no_tokens() -> None:
    figures: dict[str, Figures] = {"a": (60.0, None), "b": (70.0, None), "B": (75.0, None)}
    assert (pick(figures, Rule("best")).model, pick(figures, Rule("best")).parents) == ("b", ("B",))
    view = make_view(figures, measure="loss")
    found = choose(view, ["a", "b"], [], Rule("best"))
    assert found is not None
    assert found.model == "a", "the lowest loss"


@pytest.mark.parametrize("rule", [Rule("within", 1.0), Rule("best_under_tokens", 50), Rule("best")])
def test_no_points_no_choice(rule: Rule) -> None:
    assert choose(make_view({"B": (80.0, 10)}), ["gone"], ["B"], rule) is None


FIGURES = st.dictionaries(
    st.sampled_from([*"abcdef", *"ABC"]), st.tuples(st.integers(0, 100).map(float), st.integers(1, 9)), min_size=1
)


@given(FIGURES, st.integers(0, 30))
def test_within_by_brute_force(figures: dict[str, Figures], limit: int) -> None:
    points = {name: pair for name, pair in figures.items() if name.islower()}
    choice = choose(
        make_view(figures), list(points), [name for name in figures if name.isupper()], Rule("within", limit)
    )
    if not points:
        assert choice is None
        return
    assert choice is not None
    measure = max(accuracy for name, (accuracy, _) in figures.items() if name.isupper() or len(points) == len(figures))
    allowed = [pair for pair in points.values() if pair[0] >= measure - limit]
    assert choice.is_met == bool(allowed)
    best = min(allowed, key=lambda pair: (pair[1], -pair[0])) if allowed else None
    nearest = max(points.values(), key=lambda pair: (pair[0], -(pair[1] or 0)))
    assert points[choice.model] == (best or nearest)


@given(FIGURES, st.integers(1, 9))
def test_best_under_tokens_by_brute_force(figures: dict[str, Figures], limit: int) -> None:
    points = {name: pair for name, pair in figures.items() if name.islower()}
    choice = choose(make_view(figures), list(points), [], Rule("best_under_tokens", limit))
    if not points:
        assert choice is None
        return
    assert choice is not None
    allowed = [pair for pair in points.values() if (pair[1] or 0) <= limit]
    assert choice.is_met == bool(allowed)
    best = max(allowed, key=lambda pair: (pair[0], -(pair[1] or 0))) if allowed else None
    cheapest = min(points.values(), key=lambda pair: (pair[1] or 0, -pair[0]))
    assert points[choice.model] == (best or cheapest)


def test_what_has_no_interval_is_not_compared_by_one() -> None:
    scores = {"t-0.1": Score(accuracy=Estimate(0.7, 0.7, 0.7), tokens=90.0)}
    scores["thinking"] = Score(accuracy=Estimate(0.7, 0.6, 0.8), tokens=100.0)
    view = View("a", ("a",), "accuracy", scores, {})
    choice = choose(view, ["t-0.1"], ["thinking"], Rule("within", 1.0))
    assert choice is not None
    assert (choice.is_told_apart, choice.is_sure) == (False, False)
    assert not [said for said in describe_choice(view, choice) if "interval" in said]
    models = [Model("t-0.1", "point", "", {}, "", ""), Model("thinking", "parent", "", {}, "", "")]
    told = [said for said in describe_findings(view, find(view, models, ()), models) if "interval" in said]
    assert told == ["No interval: the evaluation gave none of t-0.1, so chance may explain their differences."]
    mean = average_scores(list(scores.values()), {"tokens": [0, 1], "thinking": [], "cut_off": []}).accuracy
    assert mean is not None
    assert not mean.has_interval
