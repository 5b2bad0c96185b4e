from __future__ import annotations

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.grid import Grid
from raymerge.pipeline.search.space import Choices, Interval, Space

SPACE: Space = {"t": Interval(0, 0.3, 0.1, is_log=False, is_whole=False), "merge_method": Choices(('"ties"', "[0, 1]"))}


def test_every_combination_is_proposed_once_in_an_order_of_the_seed() -> None:
    grid, again, other = Grid(SPACE, 1), Grid(SPACE, 1), Grid(SPACE, 2)
    tried = [*grid.ask(5), *grid.ask(5)]
    assert grid.ask(5) == []
    assert tried == again.ask(100)
    assert tried != other.ask(100)
    assert sorted(str(each) for each in tried) == sorted(
        str({"t": t, "merge_method": method}) for t in (0.0, 0.1, 0.2, 0.3) for method in ("ties", [0, 1])
    )


@pytest.mark.parametrize(
    ("step", "said"), [(None, r"search\.parameters\.t: a grid needs a step"), (1e-9, "at most 1,000,000")]
)
def test_a_grid_without_end_is_refused(step: float | None, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Grid({"t": Interval(0, 1, step, is_log=False, is_whole=False)}, 0)
