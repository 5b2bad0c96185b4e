"""Everything that a sweep will do, decided."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.pipeline.spectrum.batches import Batch
from raymerge.pipeline.spectrum.points import Recipe
from raymerge.pipeline.spectrum.record import Spectrum
from raymerge.pipeline.spectrum.seeds import warn_of_equal_seeds


@dataclass(frozen=True, slots=True)
class SweepPlan:
    """The points of a sweep, and how their models come about."""

    recipe: Recipe
    batches: tuple[Batch, ...]
    """In which the models are made, one after the other; each reads the inputs once."""
    spectrum: Spectrum
    """As the record will be when it begins."""

    @property
    def num_models(self) -> int:
        """Models to be made, or complete; fewer than points where some are equal."""
        return sum(len(batch.points) for batch in self.batches)

    @property
    def read_nbytes(self) -> int:
        """Bytes to be read for all models."""
        return sum(batch.read_nbytes for batch in self.batches)

    @property
    def write_nbytes(self) -> int:
        """Bytes of shards to be written."""
        return sum(batch.write_nbytes for batch in self.batches)

    @property
    def warnings(self) -> tuple[str, ...]:
        """The warnings of all models, each once, and those of the sweep."""
        of_models = dict.fromkeys(warning for batch in self.batches for warning in batch.plan.warnings)
        return (*of_models, *self.seed_warnings)

    @property
    def seed_warnings(self) -> tuple[str, ...]:
        """Warnings of points that differ in their seeds alone, and come out equal."""
        return warn_of_equal_seeds(self.batches)
