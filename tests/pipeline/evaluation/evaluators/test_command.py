"""Commands that evaluate, as users write them."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import pytest

from raymerge.cluster.errors import StoppedError
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Model, Place, Task
from raymerge.pipeline.evaluation.evaluators.command import Commands
from raymerge.pipeline.evaluation.figures import Figures
from raymerge.pipeline.evaluation.generation.engine import Engine
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.results import Estimate, Tokens
from raymerge.pipeline.evaluation.samples import Sample


def prepare(tmp_path: Path, script: str, more: str = "", timeout: float = 20.0) -> Task:
    path = tmp_path / "my eval.py"
    path.write_text(script)
    options = EvaluateOptions(timeout=timeout)
    return Commands().prepare(f"{sys.executable} -S -E '{path}' {{model}} {more}", options)


def run(task: Task) -> Figures:
    samples: list[Sample] = []
    place = Place(Engine("transformers", {"GIVEN": "yes"}))
    task.run(Model("t-0.5", "/models/a b", "digest"), place, (), samples.append)
    return task.summarise(samples)


def test_what_it_prints_last_counts(tmp_path: Path) -> None:
    script = """
import os, sys
print("loading", file=sys.stderr)
print('{"accuracy": 0.1}')
assert sys.argv[1:] == ["/models/a b", "t-0.5", "{x}"] and os.environ["GIVEN"] == "yes"
print('{\\n "accuracy": 0.5,\\n "tokens": 120.5, "thinking": 1, "num_items": 8, "bleu": 30, "note": "x"}')
"""
    task = prepare(tmp_path, script, "{name} '{x}'")
    assert task.name == "my eval"
    found = run(task)
    assert found.accuracy == Estimate(0.5, 0.5, 0.5)
    assert found.tokens == Tokens(120.5, 120.5, 120.5)
    assert (found.thinking, found.cut_off, found.num_items, found.other) == (1.0, None, 8, {"bleu": 30.0})


def test_intervals_and_samples(tmp_path: Path) -> None:
    script = """
print('{"loss": {"mean": 2.5, "low": 2, "high": 3}, "tokens": {"mean": 3, "p95": 9}, "other": {"x": 1}, '
      '"samples": [{"item": 7, "score": 1, "tokens": 4}, {"item": "b", "score": 0, "tokens": 2, "thinking": true}]}')
"""
    found = run(prepare(tmp_path, script))
    assert found.accuracy
    assert found.accuracy.mean == 0.5
    assert found.loss == Estimate(2.5, 2.0, 3.0)
    assert found.tokens == Tokens(3.0, 3.0, 9.0)
    assert (found.num_items, found.thinking, found.other) == (2, 1.0, {"x": 1.0})


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("import sys; print('out of memory', file=sys.stderr); sys.exit(3)", "ended with exit code 3: out of memory"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "killed by signal 11; it has printed nothing"),
        ("print('accuracy: 0.5')", "no JSON object at its end.*: accuracy: 0.5"),
        ("print('[1]')", "no JSON object"),
        ("print('{\"accuracy\": 0.5')", "no JSON object"),
        ("print('{}')", "with some of accuracy, tokens"),
        ("print('{\"accuracy\": 56.3}')", "accuracy: 56.3; a share from 0 to 1"),
        ("print('{\"accuracy\": NaN}')", "accuracy: NaN; a finite number"),
        ("print('{\"perplexity\": 1e30}')", r"perplexity: 1e\+30; a finite number is needed, below 2\^63 in size"),
        ('print(\'{"accuracy": "high"}\')', 'accuracy: "high"; a number is needed'),
        ('print(\'{"samples": [{"score": "x"}]}\')', "the sample"),
        ("print('{\"samples\": 5}')", "a list is needed"),
    ],
)
def test_what_goes_wrong_is_told_with_the_tail_of_the_output(tmp_path: Path, script: str, problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem):
        run(prepare(tmp_path, script))


def test_all_of_a_traceback_is_told_on_its_own_lines_with_stdout(tmp_path: Path) -> None:
    script = "print('at step 3'); print('at step 4', flush=True)\ndef load():\n    raise ValueError('no layer')\nload()"
    with pytest.raises(EvaluationError) as caught:
        run(prepare(tmp_path, script))
    first, *lines = str(caught.value).split("\n")
    assert first == "the command ended with exit code 1: ValueError: no layer"
    assert lines[:2] == ["    the end of its stderr:", "      Traceback (most recent call last):"]
    assert lines[-4:] == [
        "      ValueError: no layer",
        "    the end of its stdout:",
        "      at step 3",
        "      at step 4",
    ]


def test_a_command_that_hangs_ends_with_what_it_has_started(tmp_path: Path) -> None:
    script = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-S", "-E", "-c", "import time; time.sleep(600)"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
print("at step 3", flush=True)
time.sleep(600)
"""
    with pytest.raises(EvaluationError, match=r"not ended after 2 s \(--timeout\): at step 3"):
        run(prepare(tmp_path, script, timeout=2.0))
    pid = int((tmp_path / "pid").read_text())
    for _ in range(1000):
        if not os.path.exists(f"/proc/{pid}") or " Z " in Path(f"/proc/{pid}/stat").read_text():  # noqa: PTH110
            break
        time.sleep(0.05)
    else:
        pytest.fail("what the command has started is still there")


def test_a_command_ends_with_the_run(tmp_path: Path) -> None:
    def stop() -> None:
        raise StoppedError("stopped")

    task = prepare(tmp_path, "import time; time.sleep(600)")
    with pytest.raises(StoppedError):
        task.run(Model("a", "a", ""), Place(Engine("transformers"), stop), (), lambda sample: None)


def test_a_program_that_is_not_there() -> None:
    task = Commands().prepare("nonesuch-program {model}", EvaluateOptions())
    assert task.name == "nonesuch-program"
    with pytest.raises(EvaluationError, match=r"nonesuch-program cannot be run: No such file.*; no shell runs"):
        run(task)


def test_the_script_is_part_of_the_digest(tmp_path: Path) -> None:
    first = prepare(tmp_path, "print(1)")
    assert prepare(tmp_path, "print(1)").digest == first.digest
    assert prepare(tmp_path, "print(2)").digest != first.digest
    assert prepare(tmp_path, "print(1)", "--fast").digest != first.digest


def test_a_command_may_have_a_name() -> None:
    task = Commands().prepare("gsm.8k=./eval {model} --task=gsm", EvaluateOptions())
    assert task.name == "gsm.8k"
    assert Commands().prepare("./a=b/eval {model}", EvaluateOptions()).name == "eval"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("python eval.py", r"has no \{model\}, where"),
        ("python eval.py {modle}", r"did you mean '\{model\}'"),
        ("python 'eval.py {model}", "No closing quotation"),
    ],
)
def test_commands_that_cannot_be_meant(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        Commands().prepare(text, EvaluateOptions())
    with pytest.raises(ConfigError, match="--samples has no meaning for a command"):
        Commands().prepare("eval {model}", EvaluateOptions(samples=3))
    with pytest.raises(ConfigError, match="--seed has no meaning for a command"):
        Commands().prepare("eval {model}", EvaluateOptions(seed=0))
