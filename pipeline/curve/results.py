"""A finished curve."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.pipeline.curve.choice import Choice, Rule
from raymerge.pipeline.curve.findings import Findings
from raymerge.pipeline.curve.series import Series
from raymerge.pipeline.curve.types import Model, View


@dataclass(frozen=True, slots=True)
class Curve:
    """The evaluated models of a spectrum, and what they show."""

    raymerge: str
    """Version that drew it."""
    directory: str
    models: tuple[Model, ...]
    paths: tuple[str, ...]
    """The paths of the config that were varied."""
    series: tuple[Series, ...]
    views: tuple[View, ...]
    """The first is the one that models are chosen by: the mean over tasks, or the only task."""
    findings: tuple[Findings, ...]
    """Findings of each view."""
    rule: Rule
    choice: Choice | None
    """None where no point has the figures that it needs."""
    warnings: tuple[str, ...]
    """Damaged and left out evaluations."""

    @property
    def chosen(self) -> Model | None:
        """The model of the choice."""
        if self.choice is None:
            return None
        name = self.choice.model
        return next(model for model in self.models if model.name == name)
