from __future__ import annotations

import pytest

from raymerge.pipeline.evaluation.results import Estimate, Evaluation, Tokens, parse_evaluation

EVALUATION = Evaluation(
    model="t-0.1",
    url="spectrum/t-0.1",
    digest="abc",
    task="arithmetic",
    task_digest="def",
    sampling={"samples": 8, "temperature": 0.6},
    state="complete",
    error="",
    num_items=100,
    num_samples=8,
    accuracy=Estimate(0.5, 0.4, 0.6),
    tokens=Tokens(100.0, 90.0, 300.0),
    loss=None,
    thinking=0.25,
    cut_off=0.0,
    other={"pass@8": 0.9},
    samples="arithmetic-abc.jsonl",
    seconds=1.5,
)


def test_an_evaluation_is_read_as_it_was_written() -> None:
    assert parse_evaluation(EVALUATION.dump().encode()) == EVALUATION


@pytest.mark.parametrize("content", ["[]", "{", '{"model": "a"}', EVALUATION.dump().replace('"abc"', "5")])
def test_a_damaged_one_is_refused(content: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_evaluation(content.encode())
