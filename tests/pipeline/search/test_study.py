from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.options import SearchOptions
from raymerge.pipeline.search.space import Choices, Interval, Space
from raymerge.pipeline.search.study import Direction, Sampler, Study

NUMBERS: Space = {
    "t": Interval(0, 1, None, is_log=False, is_whole=False),
    "k": Interval(1, 9, 2, is_log=False, is_whole=True),
}
SPACE: Space = {**NUMBERS, "merge_method": Choices(('"ties"', '"dare_ties"', "[0, 1]"))}
ACCURACY, TOKENS = Direction("accuracy", is_maximised=True), Direction("tokens", is_maximised=False)


def run(study: Study, num_batches: int) -> list[Mapping[str, object]]:
    tried = []
    for _ in range(num_batches):
        proposals = study.ask(4)
        tried += proposals
        study.tell([measure(settings) for settings in proposals])
    return tried


def measure(settings: Mapping[str, object]) -> Sequence[float] | None:
    t, k = settings["t"], settings["k"]
    assert isinstance(t, float)
    assert isinstance(k, int)
    return None if t > 0.95 else (1 - (t - 0.7) ** 2, t + k)


@pytest.mark.parametrize("sampler", ["nsga2", "tpe", "random"])
def test_what_is_proposed_follows_from_seed_and_values(sampler: Sampler) -> None:
    studies = [Study(SPACE, sampler, [ACCURACY, TOKENS], 4, seed) for seed in (5, 5, 6)]
    first, again, other = (run(study, 6) for study in studies)
    assert first == again
    assert first != other
    assert all(0 <= settings["t"] <= 1 and settings["k"] in (1, 3, 5, 7, 9) for settings in first)  # type: ignore[operator]
    assert {str(settings["merge_method"]) for settings in first} <= {"ties", "dare_ties", "[0, 1]"}


def test_a_sampler_learns() -> None:
    study = Study({"t": NUMBERS["t"]}, "cmaes", [ACCURACY], 6, 1)
    for _ in range(15):
        proposals = study.ask(6)
        study.tell([(-((float(str(each["t"])) - 0.7) ** 2),) for each in proposals])
    assert all(abs(float(str(each["t"])) - 0.7) < 0.1 for each in proposals)


@pytest.mark.parametrize(
    ("space", "sampler", "num_objectives", "said"),
    [
        (NUMBERS, "cmaes", 2, "one objective"),
        (SPACE, "cmaes", 1, "numbers only"),
    ],
)
def test_a_sampler_that_does_not_fit_is_refused(
    space: Mapping[str, Interval | Choices], sampler: Sampler, num_objectives: int, said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Study(space, sampler, [ACCURACY, TOKENS][:num_objectives], 4, 0)


def count_area(values: Sequence[Sequence[float]]) -> float:
    """Return the area between accuracy 0 with 10 tokens and what some values reach."""
    area, reached = 0.0, 0.0
    for accuracy, tokens in sorted(values, key=lambda found: (found[1], -found[0])):
        if tokens < 10 and accuracy > reached:
            area += (accuracy - reached) * (10 - tokens)
            reached = accuracy
    return area


@pytest.mark.slow
def test_the_default_sampler_is_better_than_random_with_few_trials() -> None:
    space: Space = {f"weight[{k}]": Interval(0, 1, None, is_log=False, is_whole=False) for k in range(5)}

    def judge(settings: Mapping[str, object]) -> tuple[float, float]:
        weights = [float(str(value)) for value in settings.values()]
        share = sum(weights) / len(weights)
        spread = sum((weight - 0.15 * k) ** 2 for k, weight in enumerate(weights))
        return share * math.exp(-spread), 10 * share**2 + 2 * spread

    areas: dict[Sampler, list[float]] = {SearchOptions().sampler: [], "random": []}
    for sampler, found in areas.items():
        for seed in range(5):
            study, values = Study(space, sampler, [ACCURACY, TOKENS], 8, seed), []
            for _ in range(5):
                came = [judge(settings) for settings in study.ask(8)]
                study.tell(came)
                values += came
            found.append(count_area(values))
    best, plain = (statistics.median(found) for found in areas.values())
    assert best > 1.05 * plain, areas
