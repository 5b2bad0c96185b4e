"""Every combination of the values of a space, in an order that follows from a seed."""

from __future__ import annotations

import itertools
import json
import math
import random
from collections.abc import Sequence

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.space import Choices, Dimension, Space
from raymerge.pipeline.search.study import Settings, round_value

_MAX_POINTS = 1_000_000


class Grid:
    """Proposes every combination once; drawn in any order, so that a part of a grid is spread over all of it."""

    def __init__(self, space: Space, seed: int) -> None:
        values = [_list_values(path, dimension) for path, dimension in space.items()]
        if (count := math.prod(map(len, values))) > _MAX_POINTS:
            raise ConfigError(f"the grid has {count:,} points, at most {_MAX_POINTS:,} are searched; take larger steps")
        self._rest: list[Settings] = [dict(zip(space, row, strict=True)) for row in itertools.product(*values)]
        random.Random(seed).shuffle(self._rest)

    def ask(self, count: int) -> list[Settings]:
        """Propose settings; fewer or none at the end."""
        proposals, self._rest = self._rest[:count], self._rest[count:]
        return proposals

    def tell(self, values: Sequence[Sequence[float] | None]) -> None:
        """Take no notice of what they came to."""


def _list_values(path: str, dimension: Dimension) -> list[object]:
    if isinstance(dimension, Choices):
        return [json.loads(value) for value in dimension.values]
    if dimension.step is None:
        raise ConfigError(f"search.parameters.{path}: a grid needs a step; give it one, or take another sampler")
    count = math.floor((dimension.high - dimension.low) / dimension.step + 1e-9) + 1
    return [round_value(dimension, dimension.low + k * dimension.step) for k in range(min(count, _MAX_POINTS + 1))]
