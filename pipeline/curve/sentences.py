"""The findings of a curve, in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from raymerge.pipeline.curve.choice import Choice, Rule, have_intervals, lowest_accuracy, overlaps
from raymerge.pipeline.curve.findings import Findings
from raymerge.pipeline.curve.formats import format_count, format_estimate, format_share, format_tokens
from raymerge.pipeline.curve.phases import Jump
from raymerge.pipeline.curve.types import Measure, Model, Score, View
from raymerge.pipeline.evaluation.pairs import Comparison
from raymerge.pipeline.evaluation.results import Estimate
from raymerge.pipeline.messages import counted, escaped, listing

_MUCH_CUT_OFF = 0.05
"""From this share of answers on, accuracy and tokens depend on the largest number of tokens."""

_MANY_JUMPS = 3
"""More are told of in one sentence."""


def describe_findings(view: View, found: Findings, models: Sequence[Model]) -> tuple[str, ...]:
    """Return a sentence for each parent, jump and doubt."""
    points = [model.name for model in models if model.kind == "point" and model.name in view.scores]
    return (
        *(
            _describe_dominance(view, parent, names, found.comparisons.get(parent))
            for parent, names in found.dominators.items()
            if points
        ),
        *_describe_jumps(view, found.jumps),
        *_describe_cut_off(view),
        *_describe_unknown(view),
    )


def describe_gaps(view: View) -> tuple[str, ...]:
    """Return a sentence for each reason why models are not in a view."""
    reasons: dict[str, list[str]] = {}
    for name, reason in view.gaps.items():
        reasons.setdefault(reason, []).append(escaped(name))
    return tuple(f"{listing(names, 6)}: {escaped(reason)}" for reason, names in reasons.items())


def describe_rule(rule: Rule, measure: Measure) -> str:
    """Return what a rule asks for.

    >>> describe_rule(Rule("within", 1.0), "accuracy")
    'the fewest tokens within 1 point of the better parent'
    """
    if rule.name == "within":
        limit = rule.limit or 0.0
        return f"the fewest tokens within {_format_limit(limit)} of the better parent"
    if rule.name == "best_under_tokens":
        return f"the highest accuracy with at most {format_tokens(rule.limit or 0.0)}"
    return "the lowest loss" if measure == "loss" else "the highest accuracy"


def describe_choice(view: View, choice: Choice) -> tuple[str, ...]:
    """Return what was chosen and why, and then how certain that is, a sentence each."""
    name = escaped(choice.model)
    where = f"in the {view.title.lower()}" if len(view.tasks) > 1 else f"in {escaped(view.title)}"
    head = f"{name}: {describe_score(view.scores[choice.model], view.measure)}, {where}."
    lines = [head]
    if choice.ties:
        ties = listing(map(escaped, choice.ties))
        is_one = len(choice.ties) == 1
        lines.append(f"{ties} has the same figures." if is_one else f"Other points with the same figures: {ties}.")
    lines.append(_explain(view, choice))
    lines += _doubt(view, choice)
    if choice.parents:
        each = listing(
            f"{escaped(parent)} with {describe_score(view.scores[parent], view.measure)}" for parent in choice.parents
        )
        lines.append(f"Without a merge, {each} does at least as well by this rule.")
    return tuple(lines)


def describe_score(score: Score, measure: Measure) -> str:
    """Return the value of the measure with its interval, and the tokens.

    >>> describe_score(Score(accuracy=Estimate(0.71, 0.662, 0.754), tokens=12681.0), "accuracy")
    '71.0% (66.2 to 75.4) at 12,681 tokens'
    """
    estimate = score.get(measure)
    value = format_estimate(estimate, measure) if estimate else f"no {measure}"
    return value if score.tokens is None else f"{value} at {format_tokens(score.tokens)}"


def _describe_dominance(view: View, parent: str, dominators: Sequence[str], comparison: Comparison | None) -> str:
    if not dominators:
        return f"No point is as accurate as {escaped(parent)} with fewer tokens."
    first = dominators[0]
    text = f"{escaped(first)} is {_compare(view, first, parent)}"
    others = len(dominators) - 1
    besides = f" {counted(others, 'further point')} {'does' if others == 1 else 'do'} as well." if others else ""
    if comparison is None:
        return f"{text}{_overlap_note(view, first, parent)}.{besides}"
    if comparison.is_told_apart:
        return f"{text}.{besides}"
    return f"{text}; {_describe_interval(comparison.accuracy)}, on the same items.{besides}"


def _compare(view: View, name: str, parent: str) -> str:
    """Return how a model that is no worse compares with a parent."""
    gain = 100 * (view.estimate(name).mean - view.estimate(parent).mean)
    accuracy = (
        f"as accurate as {escaped(parent)}"
        if gain < 0.05
        else f"{_format_points(gain)} more accurate than {escaped(parent)}"
    )
    mine, its = view.scores[name].tokens or 0.0, view.scores[parent].tokens or 0.0
    if mine == its:
        return f"{accuracy} with as many tokens"
    return f"{accuracy} with {_fewer(mine, its)} ({format_count(mine)} instead of {format_count(its)})"


def _fewer(mine: float, its: float) -> str:
    """Return how a number of tokens compares with another.

    >>> _fewer(5, 10), _fewer(15, 10), _fewer(33, 2)
    ('50% fewer tokens', '50% more tokens', '16.5 times as many tokens')
    """
    if its and mine >= 2 * its:
        return f"{format_count(mine / its)} times as many tokens"
    share = 100 * (1 - mine / its) if its else 0.0
    change = f"{abs(share):.0f}%" if abs(share) >= 0.95 else f"{abs(share):.1f}%"
    return f"{change} {'fewer' if share >= 0 else 'more'} tokens"


def _overlap_note(view: View, one: str, other: str) -> str:
    return "; their 95% intervals overlap" if overlaps(view.estimate(one), view.estimate(other)) else ""


def _describe_jumps(view: View, jumps: Sequence[Jump]) -> Iterator[str]:
    """Yield a sentence for each jump, or one for those of one direction where there are many."""
    if len(jumps) <= _MANY_JUMPS:
        yield from (_describe_jump(view, jump) for jump in jumps)
        return
    for verb, alike in (
        ("rises", [jump for jump in jumps if jump.share_after > jump.share_before]),
        ("falls", [jump for jump in jumps if jump.share_after <= jump.share_before]),
    ):
        if alike:
            start, stop = min(jump.start for jump in alike), max(jump.stop for jump in alike)
            num_series = counted(len({jump.series for jump in alike}), "line").replace("1 line", "one line")
            yield (
                f"In {num_series} the share of answers that think {verb} steeply, between {alike[0].path} = {start:g}"
                f" and {stop:g}."
            )


def _describe_jump(view: View, jump: Jump) -> str:
    where = f"{jump.path} = {jump.start:g} and {jump.stop:g}" + (f" ({escaped(jump.series)})" if jump.series else "")
    verb = "rises" if jump.share_after > jump.share_before else "falls"
    text = (
        f"Between {where} the share of answers that think {verb} from {100 * jump.share_before:.0f}% to"
        f" {100 * jump.share_after:.0f}%"
    )
    before, after = view.scores[jump.before].tokens, view.scores[jump.after].tokens
    if before is not None and after is not None:
        text += f", and the tokens go from {format_count(before)} to {format_count(after)}"
    return text + "."


def _describe_cut_off(view: View) -> Iterator[str]:
    much = {
        name: score.cut_off for name, score in view.scores.items() if score.cut_off and score.cut_off >= _MUCH_CUT_OFF
    }
    if much:
        names = listing(
            f"{escaped(name)} ({100 * share:.0f}%)" for name, share in sorted(much.items(), key=lambda item: -item[1])
        )
        yield (
            f"Many answers were cut off at the largest number of tokens: {names}. With a higher limit these models"
            " would take more tokens, and may be more accurate."
        )


def _describe_unknown(view: View) -> Iterator[str]:
    if names := [escaped(name) for name in view.scores if not have_intervals(view, name)]:
        yield f"No interval: the evaluation gave none of {listing(names, 6)}, so chance may explain their differences."


def _explain(view: View, choice: Choice) -> str:
    rule = f"Rule: {describe_rule(choice.rule, view.measure)}"
    reference = escaped(choice.reference)
    if choice.rule.name == "within":
        if not choice.has_parents:
            rule = f"{rule.replace('better parent', 'most accurate point')} (no parent was evaluated)"
        estimate = view.estimate(choice.reference)
        compared = f"{reference} with {describe_score(view.scores[choice.reference], view.measure)}"
        if choice.is_met:
            mine, its = view.scores[choice.model].tokens or 0.0, view.scores[choice.reference].tokens or 0.0
            saving = (
                f"; {escaped(choice.model)} takes {_fewer(mine, its)}"
                if choice.model != choice.reference and mine != its
                else ""
            )
            return f"{rule}, {compared}{saving}."
        short = 100 * (lowest_accuracy(estimate, choice.rule) - view.estimate(choice.model).mean)
        return f"{rule}, {compared}. No point satisfies it; this is the nearest, {_format_points(short)} too low."
    if choice.rule.name == "best_under_tokens" and not choice.is_met:
        return f"{rule}. No point satisfies it; this is the nearest, the one with the fewest tokens."
    compared = ""
    if reference:
        best = "best parent with so few" if choice.rule.name == "best_under_tokens" else "best parent"
        compared = f"; the {best}, {reference}, has {describe_score(view.scores[choice.reference], view.measure)}"
    return f"{rule}{compared}."


def _doubt(view: View, choice: Choice) -> Iterator[str]:
    """Yield what the intervals leave open."""
    comparison = choice.comparison
    if comparison is not None:
        yield _describe_comparison(choice, comparison)
    elif choice.reference and choice.reference != choice.model and have_intervals(view, choice.model, choice.reference):
        verb = "do not overlap" if choice.is_told_apart else "overlap: the evaluation does not tell the two apart"
        yield f"The 95% intervals of {escaped(choice.model)} and {escaped(choice.reference)} {verb}."
    if comparison is not None and choice.rule.name == "within" and choice.is_met and not choice.is_sure:
        yield f"The difference may be more than the {_format_limit(choice.rule.limit or 0.0)} that the rule allows."
    elif (
        choice.rule.name == "within"
        and choice.is_met
        and not choice.is_sure
        and have_intervals(view, choice.model, choice.reference)
    ):
        limit = lowest_accuracy(view.estimate(choice.reference), choice.rule)
        low = format_share(view.estimate(choice.model).low)
        yield f"Its interval reaches down to {low}, below the limit of {format_share(limit)}: it may miss the rule."
    if choice.contenders:
        each = listing(
            f"{escaped(name)} with {describe_score(view.scores[name], view.measure)}" for name in choice.contenders
        )
        if choice.rule.name == "within":
            better = " with fewer tokens" if choice.is_met else ""
            yield f"More samples may show that others satisfy the rule{better}: {each}."
        else:
            yield f"Its interval overlaps those of {each}: more samples may show one of them to be better."


def _describe_comparison(choice: Choice, comparison: Comparison) -> str:
    """Return how the chosen model and the reference compare on the same items."""
    model, reference = escaped(choice.model), escaped(choice.reference)
    gain = 100 * comparison.accuracy.mean
    verb = f"{_format_points(abs(gain))} {'more' if gain > 0 else 'less'}" if abs(gain) >= 0.05 else "as"
    than = "as" if verb == "as" else "than"
    text = f"On the same {counted(comparison.num_items, 'item')}, {model} is {verb} accurate {than} {reference}"
    text += f" ({_describe_interval(comparison.accuracy)})"
    if not choice.is_told_apart:
        text += ", which the evaluation does not tell apart"
    if (ratio := comparison.tokens) is not None and ratio.mean != 1:
        text += f", and takes {_describe_ratio(ratio)}"
    return f"{text}."


def _describe_ratio(ratio: Estimate) -> str:
    """Return a ratio of tokens with its interval.

    >>> _describe_ratio(Estimate(0.52, 0.5, 0.54)), _describe_ratio(Estimate(16.5, 14.75, 18.25))
    ('48% fewer tokens (46 to 50%)', '16.5 times as many tokens (14.8 to 18.2 times)')
    """
    if ratio.mean >= 2:
        texts = [format_count(each) for each in (ratio.mean, ratio.low, ratio.high)]
        return f"{texts[0]} times as many tokens ({texts[1]} to {texts[2]} times)"
    saved = [100 * (1 - each) for each in (ratio.mean, ratio.high, ratio.low)]
    sign, word = (1, "fewer") if saved[0] > 0 else (-1, "more")
    low, high = sorted(sign * each for each in saved[1:])
    digits = 0 if abs(saved[0]) >= 9.95 else 1
    return f"{sign * saved[0]:.{digits}f}% {word} tokens ({low:.{digits}f} to {high:.{digits}f}%)"


def _describe_interval(difference: Estimate) -> str:
    """Return the interval of a difference of accuracies, in points.

    >>> _describe_interval(Estimate(-0.007, -0.024, 0.011))
    '95% interval of the difference -2.4 to +1.1 points'
    """
    return f"95% interval of the difference {100 * difference.low:+.1f} to {100 * difference.high:+.1f} points"


def _format_points(points: float) -> str:
    """Return a difference of two percentages.

    >>> _format_points(1.0), _format_points(0.04)
    ('1.0 points', '0.04 points')
    """
    return f"{points:.1f} points" if points >= 0.05 else f"{points:.2g} points"


def _format_limit(points: float) -> str:
    """Return the limit that a rule sets.

    >>> _format_limit(1.0), _format_limit(0.5)
    ('1 point', '0.5 points')
    """
    return f"{points:g} point{'' if points == 1 else 's'}"
