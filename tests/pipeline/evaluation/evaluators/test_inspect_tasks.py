"""Tasks of Inspect, where it is installed, with a model that is real and tiny."""

from __future__ import annotations

import json
import math
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluators.inspect_tasks import make_sample
from tests.commands import start_command
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TASK = """
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import includes, match
from inspect_ai.solver import generate

@task
def letters():
    data = [Sample(id="a", input="the quick", target="q"), Sample(id="b", input="lazy dog, and more of it", target="z")]
    return Task(dataset=data, solver=generate(), scorer=[includes(), match()])
"""


def test_a_sample_is_scored_by_the_scorer_that_counts() -> None:
    found = {"scores": {"includes": 1.0, "graded/style": 0.5}, "tokens": 9, "reasoning_tokens": 4}
    found |= {"item": "a", "number": 1, "thinking": True, "cut_off": False}
    found |= dict.fromkeys(("prompt", "thoughts", "texts", "expected"), "x")
    assert [make_sample(found, scorer).score for scorer in ("", "graded", "graded/style", "other")] == [
        1,
        0.5,
        0.5,
        None,
    ]
    sample = make_sample(found, "")
    assert (sample.key, sample.tokens, sample.measures["reasoning_tokens"]) == (("a", 1), 9, 4)
    unscored = make_sample({**found, "scores": {"includes": math.nan, "match": 1.0}}, "")
    assert (unscored.score, unscored.measures) == (None, {"match": 1.0, "reasoning_tokens": 4})


@pytest.mark.skipif(find_spec("inspect_ai") is not None, reason="Inspect is installed")
def test_without_inspect_it_is_said_how_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"not installed; pip install 'raymerge\[inspect\]'"):
        raymerge.evaluate(tmp_path, "inspect:letters.py")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("inspect_ai") is None, reason="it is an extra of many packages")
def test_a_task_of_ones_own(tmp_path: Path) -> None:
    model = write_tokenized(tmp_path / "model", 1, byte_level(TEXTS[0]))
    (tmp_path / "letters.py").write_text(TASK)
    task, out = f"inspect:{tmp_path / 'letters.py'}", tmp_path / "out"
    [found] = raymerge.evaluate(model, f"{task}@letters:match", out=str(out), samples=2, max_new_tokens=8, seed=1)
    assert (found.state, found.task) == ("complete", "inspect:letters:match")
    assert (found.num_items, found.num_samples) == (2, 2)
    lines = (out / "model" / found.samples).read_text().splitlines()
    samples = [json.loads(line) for line in lines][:-1]
    assert found.accuracy
    assert found.accuracy.mean == pytest.approx(found.other["match/accuracy"])
    assert found.tokens
    assert found.tokens.mean == sum(each["tokens"] for each in samples) / 4
    assert all(0 < each["tokens"] <= 8 for each in samples)
    assert found.cut_off == sum(each["tokens"] == 8 for each in samples) / 4
    with pytest.raises(ConfigError, match="the task has no scorer 'mtch'; did you mean"):
        raymerge.evaluate(model, f"{task}:mtch", out=str(out))
    with pytest.raises(ConfigError, match=r"Inspect cannot load the task: .*No inspect tasks"):
        raymerge.evaluate(model, "inspect:nonesuch", out=str(out))


SLOW_TASK = """
import pathlib, anyio
from inspect_ai import Task, task
from inspect_ai.dataset import Sample
from inspect_ai.scorer import match
from inspect_ai.solver import generate, solver

@solver
def wait():
    async def solve(state, generate):
        with pathlib.Path(__file__).with_name("calls").open("a") as calls:
            calls.write(state.sample_id + "\\n")
        while pathlib.Path(__file__).with_name("hold").exists() and state.sample_id == "5":
            await anyio.sleep(0.05)
        return state
    return solve

@task
def letters():
    data = [Sample(id=str(k), input=f"say {k}", target=str(k)) for k in range(7)]
    return Task(dataset=data, solver=[wait(), generate()], scorer=match())
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("inspect_ai") is None, reason="it is an extra of many packages")
def test_an_interrupted_task_goes_on_after_the_samples_that_inspect_has_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = write_tokenized(tmp_path / "model", 1, byte_level(TEXTS[0]))
    (tmp_path / "letters.py").write_text(SLOW_TASK)
    (tmp_path / "hold").touch()
    task, out = f"inspect:{tmp_path / 'letters.py'}", str(tmp_path / "out")
    options = ("--out", out, "--batch-size", "1", "--max-new-tokens", "4", "-q")
    process = start_command("eval", str(model), "--task", task, *options)
    calls = tmp_path / "calls"
    while not (calls.exists() and "5" in calls.read_text()):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    time.sleep(1.0)
    process.kill()
    process.communicate()
    (tmp_path / "hold").unlink()
    calls.unlink()
    model.rename(tmp_path / "moved")
    [found] = raymerge.evaluate(tmp_path / "moved", task, out=out, batch_size=1, max_new_tokens=4)
    assert (found.state, found.num_items) == ("complete", 7), found.error
    assert 2 <= len(calls.read_text().split()) < 7, "the first ones are kept"
    assert not list((tmp_path / "cache").rglob("*.eval"))
