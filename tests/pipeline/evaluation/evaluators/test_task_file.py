"""Scores of answers, without a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from raymerge.pipeline.evaluation.evaluators.task_file import TaskFiles
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample


def write(tmp_path: Path) -> str:
    path = tmp_path / "sums.yml"
    path.write_text("samples: 2\ntemperature: 0.5\nitems: [{prompt: a, answer: 42}, {id: x, prompt: b, answer: 7}]")
    return str(path)


@pytest.mark.parametrize(
    ("text", "prompt", "score", "thinking", "answer"),
    [
        ("It is 42.", "a", 1.0, False, "42"),
        ("<think>41</think>42", "a", 1.0, True, "42"),
        ("<think>42", "a", 0.0, False, None),
        ("42 no</think> 41", "a<think>\n", 0.0, True, "41"),
        ("none", "a", 0.0, False, None),
    ],
)
def test_an_answer_is_scored(
    tmp_path: Path, text: str, prompt: str, score: float, thinking: bool, answer: str | None
) -> None:
    task = TaskFiles().prepare(write(tmp_path), EvaluateOptions())
    given = {"item": "0", "number": 1, "prompt": prompt, "text": text, "tokens": 9, "cut_off": False}
    sample = task.score(42, given)  # type: ignore[attr-defined]
    assert (sample.score, sample.thinking, sample.tokens) == (score, thinking, 9)
    assert sample.detail["answer"] == answer


def test_options_go_before_the_file(tmp_path: Path) -> None:
    plain = TaskFiles().prepare(write(tmp_path), EvaluateOptions())
    assert (plain.num_samples, plain.sampling["temperature"]) == (4, 0.5)
    task = TaskFiles().prepare(write(tmp_path), EvaluateOptions(samples=3, limit=1, temperature=0.0, seed=5))
    assert (task.num_samples, task.sampling["temperature"], task.sampling["seed"]) == (3, 0.0, 5)
    assert task.digest == plain.digest
    assert task.is_wanted(Sample("0", 2, 1.0))
    assert not task.is_wanted(Sample("0", 3, 1.0))
    assert not task.is_wanted(Sample("x", 0, 1.0))


def test_a_limit_beyond_the_items_is_none(tmp_path: Path) -> None:
    plain = TaskFiles().prepare(write(tmp_path), EvaluateOptions())
    assert TaskFiles().prepare(write(tmp_path), EvaluateOptions(limit=9)).sampling == plain.sampling
