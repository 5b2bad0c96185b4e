"""Tasks that a library does as a whole, in a process of its own: all of their samples come at the end."""

from __future__ import annotations

import fcntl
import hashlib
import json
import math
import os
import shutil
from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from raymerge.cluster.home import make_private_cache
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Model, Place, Task
from raymerge.pipeline.evaluation.generation.engine import Engine, EngineError
from raymerge.pipeline.evaluation.samples import Sample

RESULTS = "results"
"""Item of the sample that holds a library's own figures, kept last."""


class LibraryTask(Task):
    """A task of a library."""

    backend: str
    """The library, as `Engine` calls it."""
    title: str
    """The library, as messages call it."""
    last = RESULTS

    @property
    def num_samples(self) -> int:
        """Unknown before the library has read its data."""
        return 0

    def run(
        self, model: Model, place: Place, finished: Collection[tuple[str, int]], keep: Callable[[Sample], None]
    ) -> None:
        """Have the library do the whole task, unless it is done."""
        if (RESULTS, 0) in finished:
            return
        place.engine.close()  # its model would share the GPU
        with _keep_unfinished(self.backend, model, self) as kept:
            request = {"kind": "evaluate", "model": model.directory, **self.make_request(kept)}
            try:
                with start_library(self.backend, place.engine.environment, place.engine.timeout) as engine:
                    *answers, last = engine.ask(request, place.check)
            except EngineError as error:
                raise EvaluationError(f"{self.title}: {error}") from error
            for sample in self.make_samples([answer["sample"] for answer in answers], last["results"]):
                keep(sample)

    @abstractmethod
    def make_request(self, kept: str | None) -> Mapping[str, object]:
        """Return the request to the library's worker, without the model.

        Args:
            kept: the directory for what there is of an unfinished task; None where there is none.
        """

    @abstractmethod
    def make_samples(self, answers: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Sequence[Sample]:
        """Return the samples that a worker has told of, and one of the library's own figures as the last.

        Raises:
            EvaluationError: what is to count is not among them.
        """


@contextmanager
def start_library(backend: str, environment: Mapping[str, str], timeout: float = math.inf) -> Iterator[Engine]:
    """Have a library in a process of its own, which may load data sets from the Hub.

    Args:
        backend: the library, as `Engine` calls it.
        environment: variables that the process has besides.
        timeout: seconds after which it is given up if it tells nothing.
    """
    engine = Engine(backend, {**environment, "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "0")}, timeout)
    try:
        yield engine
    finally:
        engine.close()


@contextmanager
def _keep_unfinished(library: str, model: Model, task: Task) -> Iterator[str | None]:
    """Have a directory in the user's own cache for a model and a task, deleted once the task is done.

    Args:
        library: that writes there, and trusts what it finds.
        model: of the task.
        task: what is done.

    Yields:
        The directory; None where another run has it, or none is safe.
    """
    text = json.dumps([model.digest, task.digest, task.sampling], sort_keys=True)
    directory = make_private_cache(library, hashlib.sha256(text.encode()).hexdigest()[:24])
    if directory is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((directory / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another run is at it, or has just deleted it
            yield None
            return
        yield str(directory)
        shutil.rmtree(directory, ignore_errors=True)
