from __future__ import annotations

from itertools import accumulate
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.checkpoint.find import FoundModel
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.sections.training_run import SCHEDULES, make_weights
from raymerge.pipeline.errors import ConfigError

STEPS = (500, 1000, 1500, 2000, 2500)


def find(pattern: str) -> list[FoundModel]:
    return [FoundModel(f"{pattern.removesuffix('*')}{step}", step) for step in STEPS]


def load(run: dict[str, Any], method: str = "linear", **others: Any) -> MergeConfig:
    return load_config({"merge_method": method, "models": {"glob": "s3://b/step-*", **run}, **others}, find=find)


def list_models(config: MergeConfig) -> dict[int, float | None]:
    """Return the weight of each checkpoint, by its step."""
    found = {}
    for entry in config.entries:
        setting = entry.parameters.get("weight")
        found[int(str(entry.model).rpartition("-")[2])] = setting and setting.value("w", 0.0)
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("run", "steps"),
    [
        ({}, STEPS),
        ({"last": 2}, (2000, 2500)),
        ({"last": 9}, STEPS),
        ({"every": 2}, (500, 1500, 2500)),
        ({"every": 2, "last": 2}, (1500, 2500)),
        ({"steps": [1000, 2000]}, (1000, 1500, 2000)),
        ({"steps": [1000, 2400], "last": 2}, (1500, 2000)),
    ],
)
def test_selects_checkpoints(run: dict[str, Any], steps: tuple[int, ...]) -> None:
    assert tuple(list_models(load(run))) == steps


@given(st.sampled_from(SCHEDULES), st.integers(1, 200), st.floats(0.5, 1))
def test_weights_sum_to_one(schedule: str, num_models: int, decay: float) -> None:
    weights = make_weights(schedule, num_models, decay)
    assert len(weights) == num_models
    assert sum(weights) == pytest.approx(1)
    assert min(weights) >= 0


@pytest.mark.parametrize(("schedule", "share"), [("uniform", lambda x: 1 - x), ("minus-sqrt", lambda x: 1 - x**0.5)])
def test_merging_stands_for_a_decay_of_the_learning_rate(schedule: str, share: Any) -> None:
    """The update before checkpoint j is in all later ones."""
    weights = make_weights(schedule, 10)
    shares = [*accumulate(reversed(weights))][::-1]
    assert shares == pytest.approx([share(j / 10) for j in range(10)])


def test_a_schedule_gives_the_weights() -> None:
    config = load({"last": 3, "schedule": "exponential", "decay": 0.5})
    assert list_models(config) == {1500: pytest.approx(1 / 7), 2000: pytest.approx(2 / 7), 2500: pytest.approx(4 / 7)}
    assert set(list_models(load({})).values()) == {0.2}, "uniform by default"
    assert set(list_models(load({}, parameters={"weight": 1})).values()) == {None}, "weights of one's own"
    assert set(list_models(load({}, "karcher")).values()) == {None}, "a method without weights"


@pytest.mark.parametrize(
    ("run", "message"),
    [
        ({"last": 2, "glob": None}, "models.glob: is missing; give a pattern such as"),
        ({"glbo": "s3://b/*", "last": 2, "glob": None}, "models.glbo: unknown key; did you mean 'glob'?"),
        ({"schedule": "minus_sqrt"}, "'minus_sqrt' is unknown; did you mean 'minus-sqrt'?"),
        ({"decay": 0.5}, "models.decay: belongs to `schedule: exponential`"),
        (
            {"schedule": "exponential", "decay": 1.5},
            "models.decay: 1.5 is given, a number above 0 and up to 1 is needed",
        ),
        ({"last": 0}, "models.last: 0 is given, a whole number from 1 on is needed"),
        ({"steps": [2, 1]}, "models.steps: [2, 1] is given; write [first, last]"),
        ({"steps": [1, 2]}, "models.steps: none of the steps that there are (500, 1000, 1500, 2000, 2500)"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(run: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load({name: value for name, value in run.items() if value or name != "glob"} if run.get("glob", 1) else run)
    assert message in str(caught.value)


def test_schedules_do_not_fit_everything() -> None:
    with pytest.raises(ConfigError, match="karcher has no 'weight' for each model; leave the schedule out"):
        load({"schedule": "uniform"}, "karcher")
    with pytest.raises(ConfigError, match="gives every model a 'weight', and so do `parameters`; leave one out"):
        load({"schedule": "uniform"}, parameters={"weight": 1})
    with pytest.raises(ConfigError, match="slerp takes exactly 1 model besides the base, 5 are given"):
        load({}, "slerp", base_model="a", parameters={"t": 0.5})
    with pytest.raises(ConfigError, match="cannot be looked up here; list the models"):
        load_config({"merge_method": "linear", "models": {"glob": "s3://b/step-*"}})


def test_a_base_that_matches_has_no_share_of_the_weights() -> None:
    config = load({"schedule": "minus-sqrt"}, "task_arithmetic", base_model="s3://b/step-500")
    weights = {entry.model.path: entry.parameters["weight"].value("w", 0.0) for entry in config.models}
    assert list(weights) == [f"s3://b/step-{step}" for step in STEPS[1:]]
    assert [*weights.values()] == make_weights("minus-sqrt", 4)
    assert not config.warnings


def test_a_pattern_that_matches_nothing() -> None:
    with pytest.raises(ConfigError, match=r"models\.glob: no directory with a config\.json matches 'a/\*'"):
        load_config({"merge_method": "linear", "models": {"glob": "a/*"}}, find=lambda pattern: [])
