"""Evaluations as files: in a directory for each model the result and the samples of each task and way of sampling."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace

from raymerge.pipeline.evaluation.evaluator import Task
from raymerge.pipeline.evaluation.results import Evaluation, parse_evaluation
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 64 * 2**20
_MAX_SAMPLES_NBYTES = 16 * 2**30
_ODD = re.compile(r"[^\w.+-]+")
_OF_RUN = ("samples", "limit")
"""Parts of the sampling that say how many samples are taken, and not what they are: their files are shared."""


class Records:
    """The evaluations below a directory."""

    def __init__(self, stores: Stores, directory: str) -> None:
        self._stores = stores
        self.directory = directory

    def find(self, model: str, digest: str, task: Task) -> Evaluation | None:
        """Return a complete evaluation of this model, or of an equal one, if there is one.

        What a file says that belongs elsewhere does not count: its names are used as paths.
        """
        samples = ("", self.samples_name(digest, task))
        for path in self._list_places(model, self.name(digest, task)):
            try:
                found = parse_evaluation(self._stores.at(self.directory).read(f"{self.directory}/{path}", _MAX_NBYTES))
            except (FileNotFoundError, ValueError):
                continue
            is_here = found.digest == digest and path == f"{found.model}/{self.name(digest, task)}.json"
            if found.state == "complete" and is_here and found.samples in samples:
                return found
        return None

    def _list_places(self, model: str, name: str) -> Iterator[str]:
        """Yield where an evaluation may be: first its own place, and all is listed only if it is not there."""
        yield f"{model}/{name}.json"
        files = self._stores.at(self.directory).list(self.directory)
        yield from (path for path in files if path.endswith(f"/{name}.json"))

    def write(self, evaluation: Evaluation, task: Task) -> None:
        """Write an evaluation, in one step."""
        url = f"{self.directory}/{evaluation.model}/{self.name(evaluation.digest, task)}.json"
        self._stores.at(url).write(url, evaluation.dump().encode())

    def copy(self, found: Evaluation, task: Task, name: str, url: str) -> Evaluation:
        """Write the evaluation of an equal model as that of another, with its samples; return it."""
        if found.model == name:
            return found
        storage = self._stores.at(self.directory)
        if found.samples:
            content = storage.read(f"{self.directory}/{found.model}/{found.samples}", _MAX_SAMPLES_NBYTES)
            storage.write(f"{self.directory}/{name}/{found.samples}", content)
        copied = replace(found, model=name, url=url)
        self.write(copied, task)
        return copied

    def samples_name(self, digest: str, task: Task) -> str:
        """Return the name of the file of samples; that of runs with fewer items or samples is the same."""
        kept = {name: value for name, value in task.sampling.items() if name not in _OF_RUN}
        return f"{_file_name(task.name)}-{_key(digest, task.digest, kept)}.jsonl"

    def name(self, digest: str, task: Task) -> str:
        """Return the name of an evaluation's file, without its ending."""
        return f"{_file_name(task.name)}-{_key(digest, task.digest, task.sampling)}"


def _file_name(task: str) -> str:
    return _ODD.sub("-", task).strip("-.")[:80] or "task"


def _key(digest: str, task_digest: str, sampling: Mapping[str, object]) -> str:
    """Return a short hash of model, task and sampling."""
    text = json.dumps([digest, task_digest, sampling], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]
