"""Results as the Hub has them: `.eval_results/TASK.yaml` beside a model, for its page and for leaderboards."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import Task
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.subjects import Subject
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_DIRECTORY = ".eval_results"
_READ_ONLY = ("hf", "http", "https")


def check_benchmarks(tasks: Sequence[Task], subjects: Sequence[Subject]) -> None:
    """Make sure that results can be written for the Hub.

    Raises:
        ConfigError: no task belongs to a benchmark, or a model lies where a file cannot be added.
    """
    if not any(task.benchmark for task in tasks):
        raise ConfigError(
            "--eval-results: no task says which benchmark of the Hub it is; write `benchmark: {dataset: org/name,"
            " task: id}` into a task file"
        )
    if there := next((subject for subject in subjects if scheme_of(subject.url) in _READ_ONLY), None):
        raise ConfigError(f"--eval-results: {there.url}: files are written beside models on disk and in buckets only")


def write_hub_result(stores: Stores, subject: Subject, task: Task, evaluation: Evaluation) -> None:
    """Write a result beside its model, in percent; nothing for a task without a benchmark, or a model that is gone.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    if task.benchmark is None or evaluation.accuracy is None or not subject.url:
        return
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    dataset, task_id = task.benchmark
    count = f"mean of {evaluation.num_samples} samples" if evaluation.num_samples > 1 else "1 sample"
    notes = f"{count} of each of {evaluation.num_items} items"
    entry = EvalResultEntry(dataset, task_id, round(100 * evaluation.accuracy.mean, 4), notes=notes)
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    url = f"{subject.url}/{_DIRECTORY}/{task_id}.yaml"
    stores.at(url).write(url, text.encode())
