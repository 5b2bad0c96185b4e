"""The options of a search: one dataclass that the API takes, and that the command line's options are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import flag, suggest
from raymerge.pipeline.options import Help
from raymerge.pipeline.search.study import Direction, Sampler

SEARCH = "Search"
_MAXIMISED = ("accuracy", "thinking")
_MIN_CMAES_BATCH = 3
OBJECTIVES = (*_MAXIMISED, "tokens", "loss", "cut_off")
"""Figures of evaluations that may become better."""


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """Options of a search: its length, how settings are proposed, and what is better.

    Raises:
        ConfigError: a value is out of range, or two exclude each other.
    """

    budget: Annotated[int, Help("Trials in all; a later run with more goes on from there.", SEARCH, "N")] = 40
    sampler: Annotated[Sampler, Help("What proposes settings.", SEARCH)] = "tpe"
    objective: Annotated[
        list[str] | None,
        Help(
            "accuracy, tokens, thinking, cut_off or loss; may be repeated.", SEARCH, "NAME", default="accuracy, tokens"
        ),
    ] = None
    batch: Annotated[int, Help("Trials proposed and merged together; what is proposed depends on it.", SEARCH, "N")] = 8
    sampler_seed: Annotated[int, Help("Seed of the sampler.", SEARCH, "N")] = 0
    subset: Annotated[
        int | None,
        Help("Judge trials by the first items of each task, and the best of them by all.", SEARCH, "N", default="all"),
    ] = None
    patience: Annotated[
        int | None, Help("Stop after so many batches without a better model.", SEARCH, "N", default="never")
    ] = None
    keep_all: Annotated[
        bool, Help("Keep the models of all trials, not only of the best; a run without it deletes them.", SEARCH)
    ] = False

    def __post_init__(self) -> None:
        for name in ("budget", "batch", "subset", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{flag(name)} is {value}; it must be 1 or more")
        if not 0 <= self.sampler_seed < 2**32:
            raise ConfigError(f"--sampler-seed is {self.sampler_seed}; it must be 0 or more, and below 2^32")
        names = self.objective or []
        for name in names:
            if name not in OBJECTIVES:
                raise ConfigError(f"--objective is {name!r}; {suggest(name, OBJECTIVES)}")
        if len(set(names)) < len(names):
            raise ConfigError(f"--objective: {', '.join(names)}; give each once")
        if self.sampler == "cmaes" and self.batch < _MIN_CMAES_BATCH:
            raise ConfigError(
                f"--sampler cmaes takes a batch for a generation: --batch must be {_MIN_CMAES_BATCH} or more"
            )
        if self.sampler == "soup" and len(names) > 1:
            raise ConfigError(f"a soup has one objective, and {', '.join(names)} are given; leave one")

    @property
    def directions(self) -> tuple[Direction, ...]:
        """The objectives."""
        default = ["accuracy"] if self.sampler in ("soup", "cmaes") else ["accuracy", "tokens"]
        return tuple(Direction(name, name in _MAXIMISED) for name in self.objective or default)
