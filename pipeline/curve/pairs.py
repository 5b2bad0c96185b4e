"""Models of a curve compared on the items that both have answered, from the samples that evaluations keep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

from raymerge import RaymergeError
from raymerge.pipeline.curve.tasks import Task
from raymerge.pipeline.curve.types import View
from raymerge.pipeline.evaluation.pairs import Comparison, average, compare
from raymerge.pipeline.evaluation.results import Evaluation
from raymerge.pipeline.evaluation.samples import Sample, parse_samples
from raymerge.pipeline.stores.open import Stores

_MAX_NBYTES = 256 * 2**20
"""Largest file of samples that is read for a comparison."""
_TOLERANCE = 1e-6
"""Largest difference between an accuracy and the mean of its items; beyond it, items are not compared."""


class Pairs:
    """Compares models; where there are no samples, nothing is said."""

    def compare(self, view: View, one: str, other: str) -> Comparison | None:
        """Return how one model compares with another in all tasks of a view; None where their samples are not there."""
        return None


@dataclass
class SamplePairs(Pairs):
    """Compares them by the files of samples, each of which is read when it is first needed."""

    stores: Stores
    place: str
    """Directory of the evaluations."""
    tasks: Sequence[Task]
    _read: dict[str, list[Sample]] = field(default_factory=dict)

    def compare(self, view: View, one: str, other: str) -> Comparison | None:
        """Return how one model compares with another in all tasks of a view; None where their samples are not there."""
        found = []
        for task in self.tasks:
            if task.label in view.tasks:
                mine, its = (self._list_samples(task.results[name]) for name in (one, other))
                comparison = compare(mine, its) if mine and its else None
                if comparison is None:
                    return None
                found.append(comparison)
        return average(found) if found else None

    def _list_samples(self, evaluation: Evaluation) -> list[Sample]:
        """Return the samples that an evaluation comes from: its file may have more, of runs with more of them."""
        if not evaluation.samples or "/" in evaluation.samples or evaluation.accuracy is None:
            return []
        url = f"{self.place}/{evaluation.model}/{evaluation.samples}"
        if url not in self._read:
            try:
                samples = list(parse_samples(self.stores.at(url).read(url, _MAX_NBYTES)))
            except (RaymergeError, OSError, ValueError):
                samples = []
            self._read[url] = samples
        samples = [each for each in self._read[url] if each.number < evaluation.num_samples and each.score is not None]
        scores: dict[str, list[float]] = {}
        for each in samples:
            scores.setdefault(each.item, []).append(each.score or 0.0)
        is_mean = bool(scores) and abs(fmean(map(fmean, scores.values())) - evaluation.accuracy.mean) < _TOLERANCE
        return samples if len(scores) == evaluation.num_items and is_mean else []
