"""The curve's choice by the same items, from the files of samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.curve.report import format_curve
from raymerge.pipeline.evaluation.figures import estimate_accuracy
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.samples import Sample
from tests.spectra import make_evaluation, make_spectrum, write_spectrum

NUM_ITEMS = 200


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """Points that are right on the first 140, 179 and 184 of 200 items, and a parent that is on 180."""
    right = {"t-0.2": (140, 5), "t-0.5": (179, 10), "t-0.8": (184, 15), "thinking": (180, 20)}
    spectrum = make_spectrum({"t": [0.2, 0.5, 0.8]})
    write_spectrum(tmp_path / "spectrum", spectrum, [evaluate(tmp_path / "spectrum", *each) for each in right.items()])
    return tmp_path / "spectrum"


def evaluate(directory: Path, model: str, figures: tuple[int, int]) -> Evaluation:
    num_right, tokens = figures
    scores = [float(item < num_right) for item in range(NUM_ITEMS)]
    samples = [Sample(str(item), 0, score, tokens=tokens + item % 3) for item, score in enumerate(scores)]
    path = directory / "evaluations" / model / "arithmetic-1.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"".join(sample.dump() for sample in samples))
    found = make_evaluation(model, num_right / NUM_ITEMS, tokens + 1, num_items=NUM_ITEMS)
    accuracy = estimate_accuracy([[score] for score in scores])
    return replace(found, accuracy=accuracy, samples=path.name, num_samples=1)


def test_the_choice_is_compared_with_the_parent_on_the_same_items(directory: Path) -> None:
    found = raymerge.curve(directory, within=1.0)
    assert found.choice is not None
    assert (found.choice.model, found.choice.reference) == ("t-0.5", "thinking")
    comparison = found.choice.comparison
    assert comparison is not None
    assert comparison.accuracy.mean == pytest.approx(-1 / NUM_ITEMS)
    assert comparison.accuracy.low > -0.02 > found.views[0].estimate("t-0.5").low - 0.9
    assert comparison.tokens is not None
    assert 0.52 < comparison.tokens.low < comparison.tokens.mean == pytest.approx(0.524, abs=1e-3)
    said = " ".join(format_curve(found).split())
    assert (
        "On the same 200 items, t-0.5 is 0.5 points less accurate than thinking (95% interval of the difference" in said
    )
    assert "which the evaluation does not tell apart, and takes 48% fewer tokens (47 to 48%)." in said
    assert "The difference may be more than the 1 point that the rule allows." in said
    assert "on the same items" in said, "of the dominated parent"


def test_without_all_samples_intervals_are_compared(directory: Path) -> None:
    path = directory / "evaluations/thinking/arithmetic-1.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    for content in (b"".join(lines[1:]), b"".join(lines[:-1]) + lines[0], b"not samples"):
        path.write_bytes(content)
        found = raymerge.curve(directory, within=1.0)
        assert found.choice is not None
        assert found.choice.comparison is None
        assert "intervals of t-0.5 and thinking overlap" in format_curve(found)


def test_an_evaluation_of_more_items_leaves_the_comparison_on_fewer(directory: Path) -> None:
    before = raymerge.curve(directory, within=1.0).choice
    for model in ("t-0.5", "thinking"):
        path = directory / f"evaluations/{model}/arithmetic-1.jsonl"
        more = [Sample(f"more-{item}", 0, float(model == "thinking"), tokens=90) for item in range(50)]
        path.write_bytes(b"".join(each.dump() for each in more) + path.read_bytes())
    after = raymerge.curve(directory, within=1.0).choice
    assert before is not None
    assert before.comparison is not None
    assert after == before, "t-0.2 and t-0.8 tell which items count"


def test_where_all_files_have_more_items_the_first_ones_count(directory: Path) -> None:
    before = raymerge.curve(directory, within=1.0).choice
    for path in directory.glob("evaluations/*/arithmetic-1.jsonl"):
        path.write_bytes(path.read_bytes() + Sample("more", 0, 1.0, tokens=90).dump())
    assert raymerge.curve(directory, within=1.0).choice == before


def test_tokens_have_an_interval(directory: Path) -> None:
    path = next((directory / "evaluations/t-0.5").glob("*.json"))
    content = json.loads(path.read_text())
    content["tokens"] |= {"low": 9.5, "high": 12.25}
    path.write_text(json.dumps(content))
    found = raymerge.curve(directory)
    score = found.views[0].scores["t-0.5"]
    assert (score.tokens_low, score.tokens_high) == (9.5, 12.25)
    assert "9.5 to 12.2" in format_curve(found)
