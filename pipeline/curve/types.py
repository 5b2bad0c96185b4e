"""The models of a curve, and what each reached in a task or in the mean over tasks."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from raymerge.pipeline.evaluation.results import Estimate

Kind = Literal["point", "parent", "other"]
"""A model of the spectrum, one that its recipe names, or one that was only evaluated beside them."""

Measure = Literal["accuracy", "loss"]


@dataclass(frozen=True, slots=True)
class Model:
    """A model that the curve may show."""

    name: str
    kind: Kind
    url: str
    settings: Mapping[str, object]
    """Value at each path of the config that was varied; empty for parents."""
    config: str
    """YAML of a point; empty for others."""
    error: str
    """Why a point could not be made; empty otherwise."""
    is_made: bool = True
    """Whether the model is kept; points may only be planned, and those of a search are deleted but for the best."""


@dataclass(frozen=True, slots=True)
class Score:
    """The figures of one model. Those that are missing or not finite are None."""

    accuracy: Estimate | None = None
    loss: Estimate | None = None
    tokens: float | None = None
    """Mean number of generated tokens of an answer."""
    tokens_low: float | None = None
    """Lower bound of the 95% interval of that mean."""
    tokens_high: float | None = None
    median_tokens: float | None = None
    p95_tokens: float | None = None
    thinking: float | None = None
    """Share of answers with a closed thinking part."""
    cut_off: float | None = None
    """Share of answers that reached the largest number of tokens."""
    num_items: int = 0

    def get(self, measure: Measure) -> Estimate | None:
        """Return the accuracy or the loss."""
        return self.accuracy if measure == "accuracy" else self.loss


@dataclass(frozen=True, slots=True)
class View:
    """The scores of all models in one task, or in the mean over tasks."""

    title: str
    tasks: tuple[str, ...]
    """Labels of the tasks; more than one for a mean."""
    measure: Measure
    scores: Mapping[str, Score]
    """By model, in the order of the models; each has a value of the measure."""
    gaps: Mapping[str, str]
    """Why the other models have no score here, by model."""

    @property
    def has_tokens(self) -> bool:
        """Whether any model's tokens were counted."""
        return any(score.tokens is not None for score in self.scores.values())

    def estimate(self, name: str) -> Estimate:
        """Return a model's value of the measure."""
        found = self.scores[name].get(self.measure)
        assert found is not None, name
        return found

    def quality(self, name: str) -> float:
        """Return a number that is larger for better models."""
        mean = self.estimate(name).mean
        return mean if self.measure == "accuracy" else -mean

    def costs(self) -> dict[str, tuple[float, float]]:
        """Return (tokens, -quality) of each model that has both."""
        return {
            name: (score.tokens, -self.quality(name)) for name, score in self.scores.items() if score.tokens is not None
        }


def number(value: object) -> float | None:
    """Return a finite number as such, and None for anything else.

    >>> number(1), number(0.5), number(True), number("a"), number(float("nan"))
    (1.0, 0.5, None, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None
