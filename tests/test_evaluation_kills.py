"""Evaluations that are killed at any moment and run again."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.evaluation.events import EvaluationEvent, Sampled
from raymerge.pipeline.evaluation.results import Evaluation
from tests.commands import start_program
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TASK = """
items: [{prompt: the quick, answer: 1}, {prompt: lazy dog, answer: 2}, {prompt: "7", answer: 7}]
temperature: 1.0
max_new_tokens: 12
samples: 30
"""
NUM_SAMPLES = 90

HELD = """
import sys, time
from raymerge.pipeline.cli.app import main
from raymerge.pipeline.evaluation.samples import _LocalLog

add, num_left = _LocalLog.add, int(sys.argv.pop(1))

def add_some(log, sample):
    global num_left
    if not num_left:
        time.sleep(600)
    num_left -= 1
    add(log, sample)

_LocalLog.add = add_some
main()
"""
"""Runs the command line, but keeps no more samples than a number of them."""


def evaluate(model: Path, out: Path, events: list[EvaluationEvent]) -> Evaluation:
    [found] = raymerge.evaluate(model, model.parent / "sums.yml", out=str(out), batch_size=1, on_event=events.append)
    return found


def list_samples(out: Path) -> list[bytes]:
    paths = list(out.glob("*/*.jsonl"))
    return [line for path in paths for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path: Path) -> None:
    model = write_tokenized(tmp_path / "model", 1, byte_level(TEXTS[0]))
    (tmp_path / "sums.yml").write_text(TASK)
    undisturbed = evaluate(model, tmp_path / "undisturbed", [])
    out = tmp_path / "out"
    moments = random.Random(0)
    for number in range(10):
        before = list_samples(out)
        command = ("eval", model, "--task", tmp_path / "sums.yml", "--out", out, "--batch-size", "1", "-q")
        process = start_program("-c", HELD, str(moments.randint(1, 8)), *command)
        if number % 2:  # while it answers; else at any moment of its start
            while list_samples(out) == before and process.poll() is None:
                time.sleep(0.01)
            time.sleep(moments.uniform(0, 0.3))
        else:
            time.sleep(moments.uniform(0, 2))
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL
        after = list_samples(out)
        assert after[: len(before)] == before
    finished = list_samples(out)
    assert 5 <= len(finished) < NUM_SAMPLES, "the kills struck before or after all the work"
    events: list[EvaluationEvent] = []
    found = evaluate(model, out, events)
    # on a slow machine the same number is told again
    told = {event.num_finished for event in events if isinstance(event, Sampled)}
    assert told | {len(finished)} == set(range(len(finished), NUM_SAMPLES + 1))
    assert sorted(list_samples(out)) == sorted(list_samples(tmp_path / "undisturbed"))
    assert (found.accuracy, found.tokens, found.other) == (undisturbed.accuracy, undisturbed.tokens, undisturbed.other)
