"""Finds the answer in what a model wrote, and compares it with the right one."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import re2

from raymerge.pipeline.decoding import parse_json

_NUMBER = re.compile(r"[-+−]?(?:\d[\d,_]*)?\.?\d+(?:[eE][-+]?\d{1,3})?(?:\s*/\s*\d+)?(?![\d.]*\d)|[-+−]?\d[\d,_]*")
_MAX_DIGITS = 60
_LETTER = re.compile(r"(?<![A-Za-z])\(?([A-Z])\)?(?![A-Za-z'’])")
_SPACE = re.compile(r"\s+")

EXTRACTIONS = ("text", "last_line", "number", "boxed", "choice")
"""Ways to find an answer that are told by a word; `regex`, `after` and `json` take an argument."""
CHECKS = ("exact", "numeric", "choice", "regex")


@dataclass(frozen=True, slots=True)
class Extraction:
    """A rule that finds the answer in the text after the thinking part."""

    how: str
    """One of EXTRACTIONS, or `regex`, `after` or `json`."""
    argument: str = ""
    """The regular expression, the text that the answer follows, or the key."""


@dataclass(frozen=True, slots=True)
class Check:
    """A comparison of an answer with the right one."""

    how: str
    """One of CHECKS."""
    tolerance: float = 0.0
    """Tolerance for numbers: |a - b| <= tolerance * max(1, |b|)."""
    is_case_sensitive: bool = False


@dataclass(frozen=True, slots=True)
class Markers:
    """Marks around the thinking part."""

    start: str = "<think>"
    end: str = "</think>"


def split_thinking(text: str, prompt: str, markers: Markers | None) -> tuple[str | None, bool | None]:
    r"""Return what follows the thinking part, and whether that is closed; None for text that has no answer yet.

    A thinking part begins with its mark in the text or at the end of the prompt, where templates of some models write
    it; one that never ends has no answer after it.

    >>> split_thinking("2 + 2 is 4</think>4", "...<think>\n", Markers())
    ('4', True)
    >>> split_thinking("<think>2 + 2", "", Markers()), split_thinking("4", "", Markers())
    ((None, False), ('4', False))
    """
    if markers is None:
        return text, None
    if markers.end in text:
        return text.rpartition(markers.end)[2], True
    is_open = markers.start in text or prompt.rstrip().endswith(markers.start)
    return (None if is_open else text), False


def extract(text: str, extraction: Extraction) -> str | None:
    r"""Return the answer that a text gives; None where it gives none.

    >>> extract("So it is 1,200 / 2 = 600.", Extraction("number")), extract("so \\boxed{x^{2}}", Extraction("boxed"))
    ('600', 'x^{2}')
    """
    found = _FINDERS[extraction.how](text, extraction.argument)
    return found.strip() if found is not None else None


def is_right(answer: str, expected: Any, check: Check) -> bool:
    """Tell whether an answer is the expected one, or one of several.

    Args:
        answer: what was extracted.
        expected: a string or number, or a list of them.
        check: how they are compared.
    """
    wanted = expected if isinstance(expected, list) else [expected]
    return any(_CHECKS[check.how](answer, str(each), check) for each in wanted)


def parse_number(text: str) -> Fraction | None:
    """Return the number that a text is; None where it is none.

    >>> parse_number("$1,200.50"), parse_number("3/4"), parse_number("four")
    (Fraction(2401, 2), Fraction(3, 4), None)
    """
    plain = text.strip().strip("$€£% ").rstrip(".").replace(",", "").replace("_", "").replace("−", "-").replace(" ", "")
    exponent = plain.lower().partition("e")[2]
    if not plain or len(plain) > _MAX_DIGITS or len(exponent.lstrip("+-0")) > 3:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def letter_of(expected: object, choices: Sequence[str]) -> str | None:
    """Return the letter of the right choice, which is given as letter, position from 0, or text.

    >>> letter_of(1, ["red", "blue"]), letter_of("blue", ["red", "blue"]), letter_of("b", ["red", "blue"])
    ('B', 'B', 'B')
    """
    letters = [chr(ord("A") + k) for k in range(len(choices))]
    if type(expected) is int and 0 <= expected < len(choices):
        return letters[expected]
    if expected in choices:
        return letters[list(choices).index(str(expected))]
    letter = str(expected).strip().upper()
    return letter if letter in letters else None


def _find_boxed(text: str, argument: str) -> str | None:
    start = max(text.rfind("\\boxed{"), text.rfind("\\fbox{"))
    if start < 0:
        return None
    start = text.index("{", start) + 1
    depth = 1
    for place in range(start, len(text)):
        depth += {"{": 1, "}": -1}.get(text[place], 0)
        if not depth:
            return text[start:place]
    return None


def _find_number(text: str, argument: str) -> str | None:
    found = _NUMBER.findall(text)
    return found[-1] if found else None


def _find_choice(text: str, argument: str) -> str | None:
    found = _LETTER.findall(text)
    return found[-1] if found else None


def _find_regex(text: str, argument: str) -> str | None:
    found = list(re2.finditer(argument, text))
    if not found:
        return None
    last = found[-1]
    return next((group for group in last.groups() if group is not None), None) if last.groups() else last[0]


def _find_after(text: str, argument: str) -> str | None:
    _, found, rest = text.rpartition(argument)
    return rest.strip().partition("\n")[0] if found else None


def _find_json(text: str, argument: str) -> str | None:
    """Return the value under a key of the last JSON object in a text, at the top level of it."""
    best = None
    stop = 0
    for start in (match.start() for match in re.finditer(r"\{", text)):
        if start < stop or (end := _match_brace(text, start)) is None:
            continue
        try:
            value = parse_json(text[start:end])
        except ValueError:
            continue
        stop = end
        if isinstance(value, dict) and argument in value:
            best = value[argument]
    if best is None:
        return None
    return best if isinstance(best, str) else ("true" if best is True else "false" if best is False else str(best))


def _match_brace(text: str, start: int) -> int | None:
    depth, in_string, is_escaped = 0, False, False
    for place in range(start, len(text)):
        sign = text[place]
        if is_escaped:
            is_escaped = False
        elif in_string:
            is_escaped, in_string = sign == "\\", sign != '"'
        elif sign == '"':
            in_string = True
        else:
            depth += {"{": 1, "}": -1}.get(sign, 0)
            if not depth:
                return place + 1
    return None


_FINDERS: Mapping[str, Callable[[str, str], str | None]] = {
    "text": lambda text, argument: text,
    "last_line": lambda text, argument: (text.strip().splitlines() or [""])[-1],
    "number": _find_number,
    "boxed": _find_boxed,
    "choice": _find_choice,
    "regex": _find_regex,
    "after": _find_after,
    "json": _find_json,
}


def _is_exact(answer: str, expected: str, check: Check) -> bool:
    return _fold(answer, check) == _fold(expected, check)


def _fold(text: str, check: Check) -> str:
    plain = _SPACE.sub(" ", text).strip()
    return plain if check.is_case_sensitive else plain.casefold()


def _is_same_number(answer: str, expected: str, check: Check) -> bool:
    found, wanted = parse_number(answer), parse_number(expected)
    if found is None or wanted is None:
        return False
    return abs(found - wanted) <= Fraction(check.tolerance) * max(Fraction(1), abs(wanted))


def _is_match(answer: str, expected: str, check: Check) -> bool:
    return re2.fullmatch(expected if check.is_case_sensitive else f"(?i:{expected})", answer) is not None


_CHECKS: Mapping[str, Callable[[str, str, Check], bool]] = {
    "exact": _is_exact,
    "numeric": _is_same_number,
    "choice": lambda answer, expected, check: answer.strip("() .").upper() == expected,
    "regex": _is_match,
}
