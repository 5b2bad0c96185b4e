"""Events of an evaluation, for whoever watches it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.redact import redact_texts


@dataclass(frozen=True, slots=True)
class Begun:
    """It is known what there is to do."""

    num_models: int
    num_tasks: int
    num_cached: int
    """Evaluations of an earlier run."""
    skipped: tuple[str, ...]
    """Points of a spectrum that could not be made, with the reasons."""
    has_spectrum: bool = False
    """Whether they are those of one spectrum."""


@dataclass(frozen=True, slots=True)
class Sampled:
    """A model has answered some of a task."""

    model: str
    task: str
    num_finished: int
    """Samples, those of an earlier run included."""
    num_samples: int
    """In all; 0 where nobody knows."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """One model and task are done, or have failed."""

    evaluation: Evaluation
    is_cached: bool


@dataclass(frozen=True, slots=True)
class Repeated:
    """An evaluation begins again, because the worker that had it was lost."""

    reason: str


EvaluationEvent = Begun | Sampled | Evaluated | Repeated
OnEvaluationEvent = Callable[[EvaluationEvent], None]

_NAMES: dict[type[EvaluationEvent], str] = {
    Begun: "begun",
    Sampled: "sampled",
    Evaluated: "evaluated",
    Repeated: "repeated",
}


def format_event(event: EvaluationEvent) -> str:
    """Return an event as a line of JSON, with its name and the time."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return json.dumps(redact_texts({"event": _NAMES[type(event)], "time": now, **asdict(event)}))
