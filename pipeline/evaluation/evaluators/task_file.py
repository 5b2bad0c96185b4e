"""A task file: prompts whose answers are generated, extracted and checked."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from raymerge.pipeline.evaluation.evaluator import EvaluationError, Evaluator, Model, Place, Task
from raymerge.pipeline.evaluation.generation.engine import EngineError
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample
from raymerge.pipeline.evaluation.tasks.answers import extract, is_right, split_thinking
from raymerge.pipeline.evaluation.tasks.task_file import Sampling, TaskFile, read_task_file


@dataclass(frozen=True)
class FileTask(Task):
    """A task file with its sampling."""

    name: str
    digest: str
    file: TaskFile
    """With the items that are wanted."""
    how: Sampling
    limit: int | None
    backend: str
    dtype: str
    batch_size: int

    @property
    def libraries(self) -> tuple[str, ...]:  # type: ignore[override]
        """The libraries that generate."""
        return (self.backend,)

    @property
    def benchmark(self) -> tuple[str, str] | None:  # type: ignore[override]
        """As the file says."""
        return self.file.benchmark

    @property
    def sampling(self) -> Mapping[str, object]:
        """Everything about the sampling that decides the samples."""
        shown = {**asdict(self.how), "stop": list(self.how.stop), "backend": self.backend, "dtype": self.dtype}
        return shown if self.limit is None else {**shown, "limit": self.limit}

    @property
    def num_samples(self) -> int:
        """Samples that it takes in all."""
        return len(self.file.items) * self.how.samples

    def is_wanted(self, sample: Sample) -> bool:
        """Tell whether a sample is one of this task's."""
        return sample.number < self.how.samples and sample.item in {item.name for item in self.file.items}

    def run(
        self, model: Model, place: Place, finished: Collection[tuple[str, int]], keep: Callable[[Sample], None]
    ) -> None:
        """Generate the answers that are missing, and check them."""
        items = {item.name: item for item in self.file.items}
        jobs = [(name, k) for name in items for k in range(self.how.samples) if (name, k) not in finished]
        asked = {name for name, _ in jobs}
        request = {
            "kind": "generate",
            "model": model.directory,
            "digest": model.digest,
            "dtype": self.dtype,
            "items": {
                name: [{"role": role, "content": content} for role, content in items[name].messages]
                for name in items
                if name in asked
            },
            "jobs": jobs,
            "template": self.file.template,
            "batch_size": self.batch_size,
            **asdict(self.how),
        }
        try:
            for answer in place.engine.ask(request, place.check) if jobs else ():
                keep(self.score(items[answer["item"]].expected, answer))
        except EngineError as error:
            raise EvaluationError(f"{self.backend}: {error}") from error

    def score(self, expected: object, answer: Mapping[str, Any]) -> Sample:
        """Return the sample that an answer of the engine comes to."""
        rest, is_closed = split_thinking(answer["text"], answer["prompt"], self.file.markers)
        found = None if rest is None else extract(rest, self.file.extraction)
        return Sample(
            item=answer["item"],
            number=answer["number"],
            score=float(found is not None and is_right(found, expected, self.file.check)),
            tokens=answer["tokens"],
            thinking=is_closed,
            cut_off=answer["cut_off"],
            detail={"prompt": answer["prompt"], "text": answer["text"], "answer": found, "expected": expected},
        )


class TaskFiles(Evaluator):
    """Prompts and answers in a YAML or JSON-lines file."""

    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Read a task file; options go before what it says."""
        file = read_task_file(Path(name))
        given = {key: getattr(options, key) for key in ("samples", "temperature", "max_new_tokens", "seed")}
        how = replace(file.sampling, **{key: value for key, value in given.items() if value is not None})
        limit = options.limit if options.limit is not None and options.limit < len(file.items) else None
        wanted = replace(file, items=file.items[:limit])
        return FileTask(file.name, file.digest, wanted, how, limit, options.backend, options.dtype, options.batch_size)
