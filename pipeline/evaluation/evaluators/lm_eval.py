"""Tasks of lm-eval, by the library; tokens are counted from the texts that it logs."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from raymerge.pipeline.decoding import is_decodable
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.evaluator import EvaluationError, Evaluator, Task
from raymerge.pipeline.evaluation.figures import Figures, summarise
from raymerge.pipeline.evaluation.generation.engine import EngineError
from raymerge.pipeline.evaluation.library_task import RESULTS, LibraryTask, start_library
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.results import Estimate
from raymerge.pipeline.evaluation.samples import Sample
from raymerge.pipeline.evaluation.tasks.answers import Markers
from raymerge.pipeline.messages import suggest

_VALUE = "value"
"""Measure of the last sample: lm-eval's value of the metric that counts."""
_MAX_FILE_NBYTES, _MAX_FILES = 64 * 2**20, 2000


@dataclass(frozen=True)
class LmEvalTask(LibraryTask):
    """A task or group of lm-eval, with the metric that counts."""

    libraries = ("lm_eval",)
    backend = "lm-eval"
    title = "lm-eval"

    name: str
    digest: str
    task: str
    metric: str
    """As in `exact_match,flexible-extract`; empty for the first."""
    include_path: str | None
    arguments: Mapping[str, object]
    """Settings of the generation that replace the task's own."""
    seed: int | None
    limit: int | None
    dtype: str
    batch_size: int

    @property
    def sampling(self) -> Mapping[str, object]:
        """The sampling that replaces the task's own, and the items."""
        shown = {"metric": self.metric, "arguments": dict(self.arguments), "seed": self.seed, "dtype": self.dtype}
        return shown if self.limit is None else {**shown, "items": self.limit}

    def make_request(self, kept: str | None) -> Mapping[str, object]:
        """Return the request to the worker."""
        return {
            "task": self.task,
            "include_path": self.include_path,
            "arguments": self.arguments,
            "seed": self.seed,
            "limit": self.limit,
            "dtype": self.dtype,
            "batch_size": self.batch_size,
            "cache": f"{kept}/answers" if kept else None,
        }

    def make_samples(self, answers: Sequence[Mapping[str, Any]], results: Mapping[str, Any]) -> Sequence[Sample]:
        """Return a sample for each document, scored by the metric that counts."""
        chosen, value = _choose(results, self.task, self.metric)
        others = {
            name if task == self.task else f"{task}:{name}": figure
            for task, figures in results.items()
            for name, figure in figures.items()
            if "," in name and is_decodable(figure)
        }
        known = {} if value is None or not is_decodable(value) else {_VALUE: value}
        return [*make_samples(answers, chosen), Sample(RESULTS, 0, None, measures={**others, **known})]

    def summarise(self, samples: Collection[Sample]) -> Figures:
        """Return the figures of the samples; the accuracy is lm-eval's own."""
        [results] = [sample for sample in samples if sample.item == RESULTS]
        found = summarise([sample for sample in samples if sample.item != RESULTS])
        accuracy, value = found.accuracy, results.measures.get(_VALUE, results.score)
        if value is None or not 0 <= value <= 1:
            accuracy = None
        elif accuracy is None or abs(accuracy.mean - value) > 1e-9:  # it is no mean over items
            accuracy = Estimate(value, value, value)
        others = {name: figure for name, figure in results.measures.items() if name != _VALUE}
        return replace(found, accuracy=accuracy, other={**found.other, **others})


class LmEvalTasks(Evaluator):
    """`lm-eval:TASK`: a task or group of lm-eval."""

    prefix = "lm-eval:"

    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Make sure that lm-eval is there, and has the task."""
        if options.backend != "transformers":
            raise ConfigError(f"--task lm-eval:{name}: only with transformers; leave --backend out for this task")
        if options.samples is not None:
            raise ConfigError(f"--task lm-eval:{name}: --samples is not lm-eval's; write `repeats:` into the task")
        try:
            version = metadata.version("lm-eval")
        except metadata.PackageNotFoundError:
            raise ConfigError(
                f"--task lm-eval:{name}: lm-eval is not installed; pip install 'raymerge[lm-eval]'"
            ) from None
        task, _, metric = name.partition(":")
        include = options.include_path
        if include is not None and not Path(include).is_dir():
            raise ConfigError(f"--include-path {include}: no such directory")
        with start_library("lm-eval", {}) as engine:
            try:
                [answer] = engine.ask({"kind": "list", "include_path": include}, lambda: None)
            except EngineError as error:
                raise ConfigError(f"--task lm-eval:{name}: lm-eval cannot list its tasks: {error}") from error
        if task not in answer["tasks"]:
            hint = suggest(task, answer["tasks"]).partition(" Allowed")[0]
            raise ConfigError(f"--task lm-eval:{name}: lm-eval has no such task; {hint}")
        arguments: dict[str, object] = {}
        if options.temperature is not None:
            arguments |= {"temperature": options.temperature, "do_sample": options.temperature > 0}
        if options.max_new_tokens is not None:
            arguments["max_gen_toks"] = options.max_new_tokens
        digest = hashlib.sha256("\0".join([task, version, *_hash_files(include)]).encode()).hexdigest()
        return LmEvalTask(
            name=f"lm-eval:{name}",
            digest=digest,
            task=task,
            metric=metric,
            include_path=include,
            arguments=arguments,
            seed=options.seed,
            limit=options.limit,
            dtype=options.dtype,
            batch_size=options.batch_size,
        )


def make_samples(logged: Collection[Mapping[str, Any]], chosen: str) -> list[Sample]:
    """Return a sample for each document; lm-eval logs one for each of a document's filters.

    Args:
        logged: what the worker tells of each.
        chosen: metric and filter whose value is the score.
    """
    found: dict[str, Sample] = {}
    names = {each["task"] for each in logged}
    markers = Markers()
    for each in logged:
        item = each["item"] if len(names) == 1 else f"{each['task']}/{each['item']}"
        sample = found.get(item)
        if sample is None:
            texts, counts = each.get("texts"), each.get("tokens")
            sample = Sample(
                item,
                0,
                None,
                tokens=round(sum(counts) / len(counts)) if counts else None,
                thinking=any(markers.end in text for text in texts) if texts else None,
                cut_off=any(count >= each["max_tokens"] for count in counts) if counts else None,
                detail={key: each[key] for key in ("prompt", "texts", "answer", "expected") if key in each},
            )
        known = {name: value for name, value in each["metrics"].items() if is_decodable(value)}
        measures = {**sample.measures, **{f"{name},{each['filter']}": value for name, value in known.items()}}
        found[item] = replace(sample, measures=measures, score=measures.get(chosen))
    return list(found.values())


def _choose(results: Mapping[str, Mapping[str, float]], task: str, metric: str) -> tuple[str, float | None]:
    """Return the metric that counts, with its filter, and its value.

    Raises:
        EvaluationError: there is none of this name.
    """
    figures = results.get(task) or next(iter(results.values()), {})
    names = [name for name in figures if "," in name and "_stderr" not in name]
    if not metric:
        return (names[0], figures[names[0]]) if names else ("", None)
    chosen = next((name for name in names if metric in (name, name.partition(",")[0])), None)
    if chosen is None:
        raise EvaluationError(f"lm-eval:{task} has no metric {metric!r}; {suggest(metric, names)}")
    return chosen, figures[chosen]


def _hash_files(directory: str | None) -> list[str]:
    """Return hashes of the files that tasks of one's own may consist of."""
    if directory is None:
        return []
    files = [path for path in sorted(Path(directory).rglob("*")) if path.is_file()][:_MAX_FILES]
    return [
        hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
        if path.suffix != ".pyc" and path.stat().st_size <= _MAX_FILE_NBYTES
    ]
