"""Results of an evaluation: one model, one task, one way of sampling."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Literal

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.redact import redact_texts


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean with its confidence interval of 95%, whose ends are the mean where none is known."""

    mean: float
    low: float
    high: float

    @property
    def has_interval(self) -> bool:
        """Whether the interval is known."""
        return self.low < self.high


@dataclass(frozen=True, slots=True)
class Tokens:
    """Generated tokens of an answer, thinking included."""

    mean: float
    median: float
    p95: float
    low: float | None = None
    """Lower bound of the 95% interval of the mean; None if the samples are not known."""
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The result of one task on one model; the fields are the keys of the JSON."""

    model: str
    """Name of the point or parent; for other models, the last part of the URL."""
    url: str
    """Directory or URL of the model."""
    digest: str
    """Digest of the model's files: models with equal digests are the same."""
    task: str
    """Name of the task, such as `arithmetic` or `lm-eval:gsm8k`."""
    task_digest: str
    """Digest of the task's content."""
    sampling: Mapping[str, object]
    """Samples per item, temperature, largest number of tokens ...; plain JSON."""
    state: Literal["complete", "failed"]
    error: str
    """Why it failed; empty otherwise."""
    num_items: int
    num_samples: int
    """Samples of each item."""
    accuracy: Estimate | None
    """Share of right answers, from 0 to 1: the mean over items of the mean over samples (mean@k)."""
    tokens: Tokens | None
    loss: Estimate | None
    """Nats per token of held-out text, or per byte where `sampling` says so."""
    thinking: float | None
    """Share of answers that contain a closed thinking part."""
    cut_off: float | None
    """Share of answers that reached the largest number of tokens."""
    other: Mapping[str, float]
    """Further figures of the evaluator, by name."""
    samples: str
    """Name of the JSON lines beside this file that hold every sample; empty where there are none."""
    seconds: float

    def dump(self) -> str:
        """Return the text of the file, without credentials."""
        return json.dumps(redact_texts(asdict(self)), indent=1, ensure_ascii=False) + "\n"


def parse_evaluation(content: bytes) -> Evaluation:
    """Return the evaluation that a file describes.

    Raises:
        ValueError: it is damaged.
    """
    try:
        found: Evaluation = decode(parse_json(content), Evaluation)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return found
