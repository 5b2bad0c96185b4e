"""Tasks of Inspect, by the library."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from statistics import fmean
from typing import Any

from raymerge.pipeline.decoding import is_decodable
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import Evaluator, Task
from raymerge.pipeline.evaluation.figures import Figures, summarise
from raymerge.pipeline.evaluation.generation.engine import EngineError
from raymerge.pipeline.evaluation.library_task import RESULTS, LibraryTask, start_library
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample
from raymerge.pipeline.messages import suggest


@dataclass(frozen=True)
class InspectTask(LibraryTask):
    """A task of Inspect, with the scorer that counts."""

    libraries = ("inspect_ai", "transformers", "accelerate")
    backend = "inspect"
    title = "Inspect"

    name: str
    digest: str
    task: str
    scorer: str
    """Name of the scorer that counts; empty for the first."""
    arguments: Mapping[str, object]
    """Settings of the generation that replace the task's own; None leaves one to the task."""
    limit: int | None
    dtype: str
    batch_size: int

    @property
    def sampling(self) -> Mapping[str, object]:
        """The sampling that replaces the task's own, and the items."""
        shown = {"scorer": self.scorer, "arguments": dict(self.arguments), "dtype": self.dtype}
        return shown if self.limit is None else {**shown, "items": self.limit}

    def make_request(self, kept: str | None) -> Mapping[str, object]:
        """Return the request to the worker."""
        return {
            "task": self.task,
            "limit": self.limit,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "kept": kept,
            **self.arguments,
        }

    def make_samples(self, answers: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Sequence[Sample]:
        """Return the samples of the whole task, each scored by the scorer that counts."""
        own = Sample(RESULTS, 0, None, measures=_list_known(results))
        return [*(make_sample(answer, self.scorer) for answer in answers), own]

    def summarise(self, samples: Collection[Sample]) -> Figures:
        """Return the figures of the samples; those of Inspect are among the others."""
        [results] = [sample for sample in samples if sample.item == RESULTS]
        answers = [sample for sample in samples if sample.item != RESULTS]
        found = summarise(answers)
        reasoning = [sample.measures["reasoning_tokens"] for sample in answers]
        mean = {"reasoning_tokens": fmean(reasoning)} if reasoning else {}
        return replace(found, other={**found.other, **mean, **results.measures})


class InspectTasks(Evaluator):
    """`inspect:TASK`: a task of Inspect, by its name or as `FILE.py@TASK`."""

    prefix = "inspect:"

    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Make sure that Inspect is there, and has the task and the scorer."""
        if options.backend != "transformers":
            raise ConfigError(f"--task inspect:{name}: only with transformers; leave --backend out for this task")
        try:
            version = metadata.version("inspect-ai")
        except metadata.PackageNotFoundError:
            raise ConfigError(
                f"--task inspect:{name}: Inspect is not installed; pip install 'raymerge[inspect]'"
            ) from None
        task, _, scorer = name.partition(":")
        file = Path(task.partition("@")[0])
        if file.suffix != ".py":
            decides = [task, *_find_version(task.partition("/")[0])]
        elif file.is_file():
            decides = [task.partition("@")[2], hashlib.sha256(file.read_bytes()).hexdigest()]
        else:
            raise ConfigError(f"--task inspect:{name}: there is no file {file}")
        with start_library("inspect", {}, options.timeout) as engine:
            try:
                [answer] = engine.ask({"kind": "list", "task": task}, lambda: None)
            except EngineError as error:
                raise ConfigError(f"--task inspect:{name}: Inspect cannot load the task: {error}") from error
        known = answer["scorers"]
        if scorer and scorer.partition("/")[0] not in known:
            raise ConfigError(f"--task inspect:{name}: the task has no scorer {scorer!r}; {suggest(scorer, known)}")
        arguments = {
            "epochs": options.samples,
            "temperature": options.temperature,
            "max_tokens": options.max_new_tokens,
            "seed": options.seed,
        }
        return InspectTask(
            name=f"inspect:{answer['task']}{':' if scorer else ''}{scorer}",
            digest=hashlib.sha256("\0".join([version, *decides]).encode()).hexdigest(),
            task=task,
            scorer=scorer,
            arguments=arguments,
            limit=options.limit,
            dtype=options.dtype,
            batch_size=options.batch_size,
        )


def make_sample(found: Mapping[str, Any], scorer: str) -> Sample:
    """Return the sample that the worker describes, scored by one of its scorers, or by the first."""
    scores: Mapping[str, float] = found["scores"]
    chosen = scorer or next(iter(scores), "")
    chosen = next((name for name in scores if name == chosen or name.startswith(f"{chosen}/")), chosen)
    return Sample(
        found["item"],
        found["number"],
        _list_known(scores).get(chosen),
        tokens=found["tokens"],
        thinking=found["thinking"],
        cut_off=found["cut_off"],
        measures={**_list_known(scores), "reasoning_tokens": found["reasoning_tokens"]},
        detail={key: found[key] for key in ("prompt", "thoughts", "texts", "expected")},
    )


def _list_known(figures: Mapping[str, float]) -> dict[str, float]:
    """Return the figures that are numbers: Inspect has NaN for what is not scored."""
    return {name: value for name, value in figures.items() if is_decodable(value)}


def _find_version(package: str) -> list[str]:
    try:
        return [metadata.version(package)]
    except metadata.PackageNotFoundError:
        return []
