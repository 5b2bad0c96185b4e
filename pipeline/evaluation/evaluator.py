"""The seam between evaluating many models and the kinds of tasks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field

from raymerge.pipeline.errors import MergeError
from raymerge.pipeline.evaluation.figures import Figures, summarise
from raymerge.pipeline.evaluation.generation.engine import Engine
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.evaluation.samples import Sample


class EvaluationError(MergeError):
    """A model could not be evaluated; the others can be."""


@dataclass(frozen=True, slots=True)
class Model:
    """A model that is on the disk of the machine where it is evaluated."""

    name: str
    directory: str
    digest: str
    """Digest of its files."""


@dataclass(frozen=True, slots=True)
class Place:
    """Options and services that a task is run with."""

    engine: Engine
    """Generates and measures losses, in a process of its own."""
    check: Callable[[], None] = field(default=lambda: None)
    """To be called now and then while waiting; raises when the run is to end."""


class Task(ABC):
    """A task, done with each model: read and checked already, picklable.

    A worker calls `run`, once for each model, with the samples that are finished; `keep` has written a sample
    when it returns. Then it calls `summarise` with all of them.
    """

    name: str
    digest: str
    """Digest of all that decides the samples but the model and the sampling."""

    libraries: tuple[str, ...] = ()
    """Modules of extras that it needs where it is run."""

    last: str = ""
    """Item of the sample that is kept last, where all come at the end: others without it are of a killed run."""

    benchmark: tuple[str, str] | None = None
    """Data set and task id of the Hub's leaderboard that its results belong to."""

    @property
    @abstractmethod
    def sampling(self) -> Mapping[str, object]:
        """Settings that decide the samples besides: samples of each item (`samples`), temperature ...; plain JSON."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples that it takes in all; 0 where nobody knows."""

    @abstractmethod
    def run(
        self, model: Model, place: Place, finished: Collection[tuple[str, int]], keep: Callable[[Sample], None]
    ) -> None:
        """Make the samples that are not finished.

        Raises:
            EvaluationError: the model could not be evaluated.
        """

    def is_wanted(self, sample: Sample) -> bool:
        """Tell whether a sample is one of this task's: the file may have more, of runs with more items."""
        return True

    def summarise(self, samples: Collection[Sample]) -> Figures:
        """Return the figures that the samples come to.

        Raises:
            EvaluationError: they come to none.
        """
        return summarise(samples)


class Evaluator(ABC):
    """A kind of task: a class in a file of its own in evaluators/, which is found by being there."""

    prefix = ""
    """Prefix of tasks of this kind, such as `loss:`; empty for the one kind that is a file."""

    @abstractmethod
    def prepare(self, name: str, options: EvaluateOptions) -> Task:
        """Read a task and check all that can be checked before a model is loaded.

        Args:
            name: what follows the prefix.
            options: of the evaluation.

        Raises:
            ConfigError: it is none, or an option has no meaning for it.
        """
