"""Tasks of lm-eval; the task is our own, over a local file."""

from __future__ import annotations

import json
import math
import pickle
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import pytest

import raymerge
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import Model, Place
from raymerge.pipeline.evaluation.evaluators.lm_eval import LmEvalTasks, make_samples
from raymerge.pipeline.evaluation.generation.engine import Engine
from raymerge.pipeline.evaluation.generation.transformers_worker import Loaded
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample
from tests.tokenized_models import TEXTS, byte_level, write_tokenized

TASK = r"""
task: local_letters
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["zzz"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
filter_list:
  - {name: first, filter: [{function: regex, regex_pattern: "([ -~])"}, {function: take_first}]}
  - {name: last, filter: [{function: regex, regex_pattern: "([ -~])", group_select: -1}, {function: take_first}]}
"""


def write_task(directory: Path, model: Path) -> Path:
    """Write a task whose every third answer is the first sign that can be printed of what the model says."""
    directory.mkdir()
    loaded = Loaded(str(model), "", "auto")
    rows = []
    for k in range(12):
        ids = loaded.tokenizer(f"{k} + 1 =", return_tensors="pt")
        made = loaded.model.generate(**ids, do_sample=False, max_new_tokens=12, pad_token_id=loaded.pad)
        text = loaded.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        first = next(sign for sign in f"{text}?" if " " <= sign <= "~")
        rows.append({"question": f"{k} + 1 =", "answer": first if k % 3 == 0 else "none"})
    (directory / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "letters.yaml").write_text(TASK.replace("DATA", str(directory / "data.jsonl")))
    return directory


@pytest.mark.slow  # imports lm-eval three times
def test_accuracy_is_that_of_its_own_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    model = write_tokenized(tmp_path / "model", 0, byte_level(TEXTS[0]))
    tasks = write_task(tmp_path / "tasks", model)
    out = str(tmp_path / "out")
    name = "lm-eval:local_letters:exact_match,first"
    [found] = raymerge.evaluate(model, name, include_path=str(tasks), out=out, batch_size=4)
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={model}"]
    command += ["--tasks", "local_letters", "--include_path", str(tasks), "--device", "cpu", "--batch_size", "4"]
    subprocess.run([*command, "--output_path", str(tmp_path / "theirs")], check=True, capture_output=True)
    [path] = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(path.read_text())["results"]["local_letters"]
    assert found.state == "complete", found.error
    assert found.accuracy
    assert found.accuracy.mean == theirs["exact_match,first"]
    assert {key: theirs[key] for key in found.other} == found.other
    assert found.other.keys() == {"exact_match,first", "exact_match,last"}
    assert 0 < found.accuracy.mean < 1
    assert found.num_items == 12
    assert found.tokens
    assert found.cut_off is not None
    lines = [json.loads(line) for line in Path(out, "model", found.samples).read_text().splitlines()]
    assert sum(line["score"] for line in lines[:-1]) / 12 == found.accuracy.mean
    with pytest.raises(ConfigError, match=r"no such task; did you mean 'local_letters'"):
        LmEvalTasks().prepare("local_leters", EvaluateOptions(include_path=str(tasks)))


class KilledError(Exception):
    pass


@pytest.mark.slow  # imports lm-eval three times
def test_a_killed_task_goes_on_after_the_answers_that_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are replaced by others, which shows that they are used."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, str(tmp_path / name))
    model = write_tokenized(tmp_path / "model", 0, byte_level(TEXTS[0]))
    tasks = write_task(tmp_path / "tasks", model)
    rows = [{"question": f"{k} + 1 =", "answer": "none"} for k in range(300)]
    (tasks / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = LmEvalTasks().prepare("local_letters", EvaluateOptions(include_path=str(tasks), batch_size=1))
    samples: list[Sample] = []

    def kill() -> None:
        if replace_answers(tmp_path / "XDG_CACHE_HOME", "") > 4:
            raise KilledError

    def run(check: Callable[[], None]) -> None:
        task.run(Model("model", str(model), "digest"), Place(Engine("transformers"), check), (), samples.append)

    with pytest.raises(KilledError):
        run(kill)
    assert samples == []
    num_finished = replace_answers(tmp_path / "XDG_CACHE_HOME", "another answer")
    run(lambda: None)
    assert len(samples) == 301
    assert sum(each.detail.get("texts") == ["another answer"] for each in samples) == num_finished < 300
    assert not list((tmp_path / "XDG_CACHE_HOME").rglob("*.db"))


def replace_answers(directory: Path, answer: str) -> int:
    """Replace the answers that lm-eval has kept, if another is given; return how many there are."""
    count = 0
    for path in directory.rglob("*.db"):
        with closing(sqlite3.connect(path)) as answers, suppress(sqlite3.OperationalError):  # it is being made
            count += answers.execute("select count(*) from unnamed").fetchone()[0]
            if answer:
                answers.execute("update unnamed set value = ?", (pickle.dumps(answer),))
                answers.commit()
    return count


def test_filters_of_a_document_are_one_sample() -> None:
    texts = {"texts": ["<think>b</think>a"], "tokens": [5], "max_tokens": 5, "prompt": "?"}
    common = {"task": "t", "item": "7", "expected": "a", "answer": "a"}
    logged = [
        {**common, **texts, "filter": "strict", "metrics": {"exact_match": 0.0}},
        {**common, **texts, "filter": "flexible", "metrics": {"exact_match": 1.0}},
    ]
    [sample] = make_samples(logged, "exact_match,flexible")
    assert (sample.item, sample.score, sample.tokens, sample.thinking, sample.cut_off) == ("7", 1.0, 5, True, True)
    assert sample.measures == {"exact_match,strict": 0.0, "exact_match,flexible": 1.0}
    other = {"task": "u", "item": "7", "expected": "a", "answer": "a", "filter": "none", "metrics": {"acc": 1.0}}
    first, second = make_samples([logged[0], other], "acc,none")
    assert (first.item, second.item) == ("t/7", "u/7")
    assert (first.score, second.score, second.tokens, second.cut_off) == (None, 1.0, None, None)
    for value in (math.nan, math.inf, 1e30):
        [unknown] = make_samples([{**other, "metrics": {"acc": value, "bytes": 3.0}}], "acc,none")
        assert (unknown.score, unknown.measures) == (None, {"bytes,none": 3.0}), "no more than can be read again"


def test_mistakes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write `repeats:` into the task"):
        LmEvalTasks().prepare("gsm8k", EvaluateOptions(samples=2))
    with pytest.raises(ConfigError, match="only with transformers"):
        LmEvalTasks().prepare("gsm8k", EvaluateOptions(backend="vllm"))
    with pytest.raises(ConfigError, match="no such directory"):
        LmEvalTasks().prepare("gsm8k", EvaluateOptions(include_path=str(tmp_path / "none")))
