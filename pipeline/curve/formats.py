"""Figures of a curve as text: shares, tokens, settings."""

from __future__ import annotations

import json
from collections.abc import Mapping

from raymerge.pipeline.curve.types import Measure
from raymerge.pipeline.evaluation.results import Estimate


def format_estimate(estimate: Estimate, measure: Measure) -> str:
    """Return a value with its interval.

    >>> format_estimate(Estimate(2.5, 2.25, 2.75), "loss"), format_estimate(Estimate(0.5, 0.5, 0.5), "accuracy")
    ('loss 2.500 (2.250 to 2.750)', '50.0%')
    """
    if measure == "loss":
        value, interval = f"loss {estimate.mean:.3f}", f" ({estimate.low:.3f} to {estimate.high:.3f})"
    else:
        value, interval = format_share(estimate.mean), f" ({100 * estimate.low:.1f} to {100 * estimate.high:.1f})"
    return value + interval if estimate.has_interval else value


def format_share(share: float) -> str:
    """Return a share in percent.

    >>> format_share(0.5)
    '50.0%'
    """
    return f"{100 * share:.1f}%"


def format_count(tokens: float | None) -> str:
    """Return a number of tokens.

    >>> format_count(12448.4), format_count(12.44), format_count(None)
    ('12,448', '12.4', '')
    """
    if tokens is None:
        return ""
    return f"{tokens:,.0f}" if tokens >= 100 else f"{tokens:.1f}".removesuffix(".0")


def format_tokens(tokens: float) -> str:
    """Return a number of tokens with its unit.

    >>> format_tokens(1.0), format_tokens(1.04), format_tokens(16.5)
    ('1 token', '1 token', '16.5 tokens')
    """
    text = format_count(tokens)
    return f"{text} token{'' if text == '1' else 's'}"


def format_settings(settings: Mapping[str, object]) -> str:
    """Return the settings of a point on one line.

    >>> format_settings({"t": 0.1, "weight[1]": [0, 0.4]})
    't = 0.1, weight[1] = [0, 0.4]'
    """
    return ", ".join(f"{path} = {format_setting(value)}" for path, value in settings.items())


def format_setting(value: object) -> str:
    """Return the value of a setting as YAML would say it.

    >>> format_setting("ties"), format_setting(0.5)
    ('ties', '0.5')
    """
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
