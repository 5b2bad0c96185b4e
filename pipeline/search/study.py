"""Proposes settings by what earlier ones came to: Optuna's samplers, made repeatable."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.space import Choices, Interval, Space

if TYPE_CHECKING:
    from types import ModuleType

    import optuna

Sampler = Literal["nsga2", "tpe", "cmaes", "grid", "random", "soup"]
Settings = Mapping[str, object]
"""A value for each path of the config."""

_MIN_GENERATION = 8
"""Fewest trials of a generation, and fewest random ones before values are modelled: smaller batches make up several."""
_DIGITS = 6
"""Digits of a proposed number: settings that differ less make models which nobody can tell apart."""


@dataclass(frozen=True, slots=True)
class Direction:
    """One objective."""

    name: str
    """Name of a figure of evaluations, such as `accuracy`."""
    is_maximised: bool


class Study:
    """A sequence of batches of settings, each proposed by the values of all earlier batches.

    What it proposes follows from the space, the sampler, the seed and those values alone, so that a search that was
    killed is replayed from its record.
    """

    def __init__(
        self, space: Space, sampler: Sampler, directions: Sequence[Direction], batch_size: int, seed: int
    ) -> None:
        self._space = space
        self._optuna = load_optuna()
        self._study = self._optuna.create_study(
            directions=["maximize" if direction.is_maximised else "minimize" for direction in directions],
            sampler=_make_sampler(self._optuna, space, sampler, len(directions), batch_size, seed),
        )
        self._open: list[optuna.Trial] = []

    def ask(self, count: int) -> list[Settings]:
        """Propose settings; `tell` wants values for them in this order."""
        self._open = [self._study.ask() for _ in range(count)]
        return [{path: _suggest(trial, path, self._space) for path in self._space} for trial in self._open]

    def tell(self, values: Sequence[Sequence[float] | None]) -> None:
        """Say what the settings proposed last came to: a value for each objective, or None where they failed."""
        for trial, found in zip(self._open, values, strict=True):
            if found is None or not all(map(math.isfinite, found)):
                self._study.tell(trial, state=self._optuna.trial.TrialState.FAIL)
            else:
                self._study.tell(trial, list(found))
        self._open = []


def round_value(dimension: Interval, value: float) -> int | float:
    """Return a value of a range as it is proposed."""
    return round(value) if dimension.is_whole else float(f"{value:.{_DIGITS}g}")


def load_optuna() -> ModuleType:
    """Return Optuna, with its messages turned off.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise ConfigError(f"a search needs Optuna ({error}); pip install 'raymerge[spectrum]'") from None
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


def _make_sampler(
    optuna: ModuleType, space: Space, sampler: Sampler, num_objectives: int, batch_size: int, seed: int
) -> Any:
    samplers = optuna.samplers
    generation = max(batch_size, _MIN_GENERATION)
    if sampler == "nsga2":
        return samplers.NSGAIISampler(population_size=generation, seed=seed)
    if sampler == "tpe":
        return samplers.TPESampler(n_startup_trials=generation, multivariate=True, constant_liar=True, seed=seed)
    if sampler == "cmaes":
        if num_objectives > 1:
            raise ConfigError("the sampler cmaes has one objective; give --objective once, or take nsga2 or tpe")
        if any(isinstance(dimension, Choices) for dimension in space.values()):
            raise ConfigError("the sampler cmaes searches numbers only; take lists out of the space, or nsga2 or tpe")
        return samplers.CmaEsSampler(popsize=batch_size, seed=seed)
    return samplers.RandomSampler(seed=seed)


def _suggest(trial: optuna.Trial, path: str, space: Space) -> object:
    dimension = space[path]
    if isinstance(dimension, Choices):
        return json.loads(trial.suggest_categorical(path, dimension.values))
    assert isinstance(dimension, Interval)
    if dimension.is_whole:
        return trial.suggest_int(path, int(dimension.low), int(dimension.high), step=int(dimension.step or 1))
    found = trial.suggest_float(path, dimension.low, dimension.high, step=dimension.step, log=dimension.is_log)
    return round_value(dimension, found)
