"""Results as the Hub has them: `.eval_results/TASK.yaml` beside a model, for its page and for leaderboards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import yaml

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import Task
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.subjects import Subject
from raymerge.pipeline.output.journal import LOCK
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import is_url, scheme_of

_DIRECTORY = ".eval_results"
_READ_ONLY = ("hf", "http", "https")


def check_benchmarks(stores: Stores, tasks: Sequence[Task], subjects: Sequence[Subject]) -> None:
    """Make sure that results can be written for the Hub.

    Raises:
        ConfigError: no task belongs to a benchmark, or a model lies where a file cannot be added.
        OutputError: a repository may not be written to.
    """
    if not any(task.benchmark for task in tasks):
        raise ConfigError(
            "--eval-results: no task says which benchmark of the Hub it is; write `benchmark: {dataset: org/name,"
            " task: id}` into a task file"
        )
    for subject in subjects:
        if scheme_of(subject.url) in ("http", "https") and not subject.is_parent:
            raise ConfigError(f"--eval-results: {subject.url}: no file can be added there")
        place = _find_place(subject)
        if scheme_of(place) == "hf":
            with stores.at(place).lock(f"{place}/{LOCK}"):  # which asks whether it may be written to
                pass


def write_hub_result(stores: Stores, subject: Subject, task: Task, evaluation: Evaluation) -> None:
    """Write a result beside its model, in percent; to a repository of the Hub as a commit.

    Nothing is written for a task without a benchmark, a model that is gone, or a parent that is not on a disk or in a
    bucket: it is somebody else's.

    Source: https://huggingface.co/docs/hub/eval-results
    """
    place = _find_place(subject)
    if task.benchmark is None or evaluation.accuracy is None or not place:
        return
    from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml

    dataset, task_id = task.benchmark
    count = f"mean of {evaluation.num_samples} samples" if evaluation.num_samples > 1 else "1 sample"
    notes = f"{count} of each of {evaluation.num_items} items"
    entry = EvalResultEntry(dataset, task_id, round(100 * evaluation.accuracy.mean, 4), notes=notes)
    text = yaml.safe_dump(eval_result_entries_to_yaml([entry]), sort_keys=False)
    storage = stores.at(place)
    with storage.lock(f"{place}/{LOCK}") if scheme_of(place) == "hf" else nullcontext():
        storage.write(f"{place}/{_DIRECTORY}/{task_id}.yaml", text.encode())
        storage.publish(f"{place}/{_DIRECTORY}", f"Result of {task_id}")  # nothing of a killed merge


def _find_place(subject: Subject) -> str:
    """Return the directory that results are written to, or the branch of a repository; empty where there is none."""
    scheme = scheme_of(subject.url)
    if scheme not in _READ_ONLY:
        return subject.url
    if scheme != "hf" or subject.is_parent:
        return ""
    return subject.shown if is_url(subject.shown) else f"hf://{subject.shown}"
