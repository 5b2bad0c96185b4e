from __future__ import annotations

import pytest

from raymerge.pipeline.evaluation.tasks.answers import (
    Check,
    Extraction,
    Markers,
    extract,
    is_right,
    split_thinking,
)


@pytest.mark.parametrize(
    ("how", "argument", "text", "answer"),
    [
        ("text", "", "  yes \n", "yes"),
        ("last_line", "", "first\nlast \n\n", "last"),
        ("last_line", "", "", ""),
        ("number", "", "12 apples and 1,234.5 pears.", "1,234.5"),
        ("number", "", "it is -7.", "-7"),
        ("number", "", "x = 3/4", "3/4"),
        ("number", "", "x = 1e-3", "1e-3"),
        ("number", "", "none", None),
        ("boxed", "", r"\boxed{1} and \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        ("boxed", "", r"\boxed{1", None),
        ("choice", "", "A is wrong, so the answer is (C).", "C"),
        ("choice", "", "no letter here: It's", None),
        ("regex", r"answer is (\w+)", "answer is no, answer is yes", "yes"),
        ("regex", r"\d+", "1 22", "22"),
        ("regex", r"(a)|(b)", "xb", "b"),
        ("after", "####", "thus\n#### 18\nand", "18"),
        ("after", "####", "18", None),
        ("json", "answer", 'text {"answer": "4", "b": {"answer": 5}} end', "4"),
        ("json", "answer", '{"answer": "}"} {"answer": 4.5}', "4.5"),
        ("json", "answer", "{{{ {'answer': 4}", None),
    ],
)
def test_answers_are_found(how: str, argument: str, text: str, answer: str | None) -> None:
    assert extract(text, Extraction(how, argument)) == answer


@pytest.mark.parametrize(
    ("check", "answer", "expected", "right"),
    [
        (Check("exact"), "The  Hague", "the hague", True),
        (Check("exact", is_case_sensitive=True), "The Hague", "the hague", False),
        (Check("exact"), "b", ["a", "b"], True),
        (Check("numeric"), "1,200.0", 1200, True),
        (Check("numeric"), "$3.50", "7/2", True),
        (Check("numeric"), "0.333", "1/3", False),
        (Check("numeric", 1e-3), "0.333", "1/3", True),
        (Check("numeric", 0.01), "1009", 1000, True),
        (Check("numeric"), "nan", 1, False),
        (Check("numeric"), "1e400000000", 1, False),
        (Check("numeric"), "1/0", 1, False),
        (Check("choice"), "(B)", "B", True),
        (Check("regex"), "Paris.", r"paris\.?", True),
        (Check("regex"), "in Paris", "paris", False),
    ],
)
def test_answers_are_checked(check: Check, answer: str, expected: object, right: bool) -> None:
    assert is_right(answer, expected, check) is right


@pytest.mark.parametrize(
    ("text", "prompt", "expected"),
    [
        ("4", "", ("4", False)),
        ("<think>a</think>4", "", ("4", True)),
        ("a</think>4", "<think>\n", ("4", True)),
        ("a 4", "<think>\n", (None, False)),
        ("<think>a 4", "", (None, False)),
        ("<think></think>4</think>5", "", ("5", True)),
    ],
)
def test_the_answer_follows_the_thinking(text: str, prompt: str, expected: tuple[str | None, bool]) -> None:
    assert split_thinking(text, prompt, Markers()) == expected
    assert split_thinking(text, prompt, None) == (text, None)
