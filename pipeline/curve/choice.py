"""The choice of a model of a spectrum, by a rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from raymerge.pipeline.curve.pairs import Pairs
from raymerge.pipeline.curve.types import View
from raymerge.pipeline.evaluation.pairs import Comparison
from raymerge.pipeline.evaluation.results import Estimate

RuleName = Literal["within", "best_under_tokens", "best"]
DEFAULT_POINTS = 1.0
"""Percentage points below the better parent that the default rule allows."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A rule for the choice.

    `within`: the fewest tokens among the points whose accuracy is at most `limit` percentage points below that of the
    most accurate parent, or of the most accurate point where no parent was evaluated. `best_under_tokens`: the highest
    accuracy among the points with at most `limit` tokens. `best`: the highest accuracy, or the lowest loss.
    """

    name: RuleName
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """The point that a rule chooses."""

    rule: Rule
    model: str
    is_met: bool
    """Whether it satisfies the rule; otherwise it is the nearest one."""
    reference: str
    """The best parent; for `within`, if no parent was evaluated, the best point; empty where there is none."""
    has_parents: bool
    """Whether any parent was evaluated."""
    is_told_apart: bool
    """Whether the interval of the difference to the reference has no 0, or else their two intervals do not overlap."""
    is_sure: bool
    """For `within`: whether all of that interval, or else of its own, is above the limit, or it is the reference."""
    contenders: tuple[str, ...]
    """Points that more samples could show to be the better choice."""
    parents: tuple[str, ...]
    """Parents that do at least as well by the same rule, without a merge."""
    comparison: Comparison | None = None
    """With the reference, on the same items; None where it is the reference, or where their samples are not kept."""
    ties: tuple[str, ...] = ()
    """Other points with the same accuracy or loss, and the same tokens."""


def choose(
    view: View, points: Sequence[str], parents: Sequence[str], rule: Rule, pairs: Pairs | None = None
) -> Choice | None:
    """Return the choice among the points that have all the figures that the rule needs; None if none has.

    Args:
        view: the scores.
        points: names of the spectrum's points.
        parents: names of its parents.
        rule: how to choose; one with tokens needs a view of accuracy.
        pairs: compares models on the same items.
    """
    pairs = pairs or Pairs()
    points, parents = (_list_candidates(view, names, rule) for names in (points, parents))
    if not points:
        return None
    choose_by = {"within": _choose_within, "best_under_tokens": _choose_under, "best": _choose_best}[rule.name]
    choice = choose_by(view, points, parents, rule, pairs)
    return replace(choice, ties=tuple(name for name in points if _is_tie(view, name, choice.model)))


def overlaps(one: Estimate, other: Estimate) -> bool:
    """Tell whether two intervals are known, and have a value in common."""
    return one.has_interval and other.has_interval and one.low <= other.high and other.low <= one.high


def have_intervals(view: View, *names: str) -> bool:
    """Tell whether the intervals of models are known."""
    return all(view.estimate(name).has_interval for name in names)


def are_apart(one: Estimate, other: Estimate) -> bool:
    """Tell whether two intervals are known, and have no value in common."""
    return one.has_interval and other.has_interval and not overlaps(one, other)


def _list_candidates(view: View, names: Sequence[str], rule: Rule) -> list[str]:
    return [
        name for name in names if name in view.scores and (rule.name == "best" or view.scores[name].tokens is not None)
    ]


def _choose_within(view: View, points: list[str], parents: list[str], rule: Rule, pairs: Pairs) -> Choice:
    reference = _most_accurate(view, parents or points)
    limit = lowest_accuracy(view.estimate(reference), rule)
    near = [name for name in points if view.estimate(name).mean >= limit]
    is_met = bool(near)
    model = _fewest_tokens(view, near) if near else _most_accurate(view, points)
    mine, allowed = view.estimate(model), (rule.limit or 0.0) / 100 + 1e-12
    comparison = pairs.compare(view, model, reference) if model != reference else None
    contenders = [
        name
        for name in points
        if name != model
        and view.estimate(name).high >= limit > view.estimate(name).mean
        and (not is_met or _tokens(view, name) < _tokens(view, model))
        and ((found := pairs.compare(view, name, reference)) is None or found.accuracy.high >= -allowed)
    ]
    matching = [
        name
        for name in parents
        if view.estimate(name).mean >= limit and (not is_met or _tokens(view, name) <= _tokens(view, model))
    ]
    return Choice(
        rule,
        model,
        is_met,
        reference,
        bool(parents),
        is_told_apart=comparison.is_told_apart if comparison else are_apart(mine, view.estimate(reference)),
        is_sure=comparison.accuracy.low >= -allowed
        if comparison
        else model == reference or (mine.has_interval and mine.low >= limit),
        contenders=tuple(contenders),
        parents=tuple(matching),
        comparison=comparison,
    )


def lowest_accuracy(reference: Estimate, rule: Rule) -> float:
    """Return the accuracy from which on `within` is satisfied."""
    return reference.mean - (rule.limit or 0.0) / 100 - 1e-12  # 0.80 - 0.01 is above 0.79


def _choose_under(view: View, points: list[str], parents: list[str], rule: Rule, pairs: Pairs) -> Choice:
    limit = rule.limit or 0.0
    cheap = [name for name in points if _tokens(view, name) <= limit]
    if cheap:
        return _choose_best(view, cheap, [name for name in parents if _tokens(view, name) <= limit], rule, pairs)
    model = _fewest_tokens(view, points)
    matching = tuple(name for name in parents if _tokens(view, name) <= limit)
    return Choice(
        rule, model, False, "", bool(parents), is_told_apart=False, is_sure=False, contenders=(), parents=matching
    )


def _choose_best(view: View, points: list[str], parents: list[str], rule: Rule, pairs: Pairs) -> Choice:
    model = _most_accurate(view, points)
    mine = view.estimate(model)
    contenders = tuple(
        name
        for name in points
        if name != model
        and overlaps(mine, view.estimate(name))
        and ((found := pairs.compare(view, model, name)) is None or not found.is_told_apart)
    )
    reference = _most_accurate(view, parents) if parents else ""
    comparison = pairs.compare(view, model, reference) if reference else None
    is_apart = bool(reference) and are_apart(mine, view.estimate(reference))
    return Choice(
        rule,
        model,
        True,
        reference,
        bool(parents),
        is_told_apart=comparison.is_told_apart if comparison else is_apart,
        is_sure=not contenders and have_intervals(view, *points),
        contenders=contenders,
        parents=tuple(name for name in parents if view.quality(name) >= view.quality(model)),
        comparison=comparison,
    )


def _is_tie(view: View, name: str, other: str) -> bool:
    """Tell whether two models have the same figures, of those that choices go by."""
    figures = [(view.quality(each), _tokens(view, each)) for each in (name, other)]
    return name != other and figures[0] == figures[1]


def _tokens(view: View, name: str) -> float:
    tokens = view.scores[name].tokens
    return float("inf") if tokens is None else tokens


def _most_accurate(view: View, names: Sequence[str]) -> str:
    """Return the best one; of equal ones that with the fewest tokens, then the first."""
    return min(names, key=lambda name: (-view.quality(name), _tokens(view, name)))


def _fewest_tokens(view: View, names: Sequence[str]) -> str:
    """Return the cheapest one; of equal ones the best, then the first."""
    return min(names, key=lambda name: (_tokens(view, name), -view.quality(name)))
