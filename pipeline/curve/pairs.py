"""Models of a curve compared on the items that both have answered, from the samples that evaluations keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    _items: dict[str, frozenset[str] | None] = field(default_factory=dict)
    """By label of a task."""

    def compare(self, view: View, one: str, other: str) -> Comparison | None:
        """Return how one model compares with another in all tasks of a view; None where their samples are not there."""
        found = []
        for task in self.tasks:
            if task.label in view.tasks:
                mine, its = (self._list_samples(task, name) for name in (one, other))
                comparison = compare(mine, its) if mine and its else None
                if comparison is None:
                    return None
                found.append(comparison)
        return average(found) if found else None

    def _list_samples(self, task: Task, name: str) -> list[Sample]:
        """Return the samples that a model's evaluation comes from.

        Its file may have more, of runs with more samples or more items. Which items count is then told by a model
        whose file has no more; where there is none, the first ones count.
        """
        evaluation = task.results[name]
        samples = self._read_scored(evaluation)
        scores = _list_scores(samples)
        if len(scores) > evaluation.num_items:
            items = self._find_items(task) or frozenset(list(scores)[: evaluation.num_items])
            samples = [each for each in samples if each.item in items]
            scores = _list_scores(samples)
        return samples if _is_whole(evaluation, scores) else []

    def _find_items(self, task: Task) -> frozenset[str] | None:
        """Return the items of a task, from the first model whose file has exactly those of its evaluation."""
        if task.label not in self._items:
            found = ((each, _list_scores(self._read_scored(each))) for each in task.results.values())
            self._items[task.label] = next(
                (frozenset(scores) for each, scores in found if _is_whole(each, scores)), None
            )
        return self._items[task.label]

    def _read_scored(self, evaluation: Evaluation) -> list[Sample]:
        """Return all samples with a score in the file of an evaluation, but for those of larger numbers of samples."""
        if not evaluation.samples or "/" in evaluation.samples or evaluation.accuracy is None:
            return []
        url = f"{self.place}/{evaluation.model}/{evaluation.samples}"
        if url not in self._read:
            try:
                samples = list(parse_samples(self.stores.at(url).read(url, _MAX_NBYTES)))
            except (RaymergeError, OSError, ValueError):
                samples = []
            self._read[url] = samples
        return [each for each in self._read[url] if each.number < evaluation.num_samples and each.score is not None]


def _list_scores(samples: Sequence[Sample]) -> dict[str, list[float]]:
    scores: dict[str, list[float]] = {}
    for each in samples:
        scores.setdefault(each.item, []).append(each.score or 0.0)
    return scores


def _is_whole(evaluation: Evaluation, scores: Mapping[str, Sequence[float]]) -> bool:
    """Tell whether scores by item are those of an evaluation."""
    if evaluation.accuracy is None or not scores or len(scores) != evaluation.num_items:
        return False
    return abs(fmean(map(fmean, scores.values())) - evaluation.accuracy.mean) < _TOLERANCE
