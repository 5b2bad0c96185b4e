"""Fields of an item: the prompt that they fill, and whether its answer can be checked."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import re2

from raymerge.pipeline.evaluation.tasks.answers import Check, letter_of, parse_number
from raymerge.pipeline.messages import listing, shown
from raymerge.pipeline.patterns import compile_pattern

LETTERS = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
"""Letters of choices."""


def fill_prompt(template: str, fields: Mapping[str, Any]) -> str:
    """Return a prompt: each `{field}` replaced; other braces stay.

    Raises:
        KeyError: a field is missing.
    """

    def replace(match: Any) -> str:
        name = match[1]
        if name == "choices" and isinstance(fields.get(name), list):
            return "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, fields[name], strict=False))
        return str(fields[name])

    return str(re2.sub(r"\{([A-Za-z_][A-Za-z0-9_]*)\}", replace, template))


def explain_answer(expected: object, fields: Mapping[str, Any], check: Check) -> str:
    """Return why an answer cannot be checked; empty where it can."""
    for each in expected if isinstance(expected, list) else [expected]:
        if isinstance(each, bool):
            return f"the answer {shown(each)} is neither text nor a number; put yes, no, true and false in quotes"
        if not isinstance(each, str | int | float):
            return f"the answer {shown(each)} is neither text nor a number"
        if check.how == "numeric" and not is_number(each):
            return f"the answer {shown(each)} is no number, and `check` is numeric"
        if check.how == "regex":
            try:
                compile_pattern(str(each))
            except ValueError as error:
                return f"the answer {shown(each)} is no regular expression: {error}"
    if check.how == "choice":
        choices = fields.get("choices", LETTERS)
        if not isinstance(choices, list | tuple) or len(choices) > len(LETTERS):
            return f"`choices` is {shown(choices)}; a list of at most {len(LETTERS)} is needed"
        if letter_of(expected, choices) is None:
            return f"the answer {shown(expected)} is none of the choices: {listing(choices)}"
    return ""


def is_number(value: object) -> bool:
    """Tell whether an answer, or each of several, is a number."""
    values = value if isinstance(value, list) else [value]
    return all(type(each) in (int, float, str) and parse_number(str(each)) is not None for each in values)
