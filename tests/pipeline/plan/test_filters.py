from __future__ import annotations

from pathlib import Path

import raymerge
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.plan.filters import warn_of_idle_filters
from tests.checkpoints import write_family

NAMES = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight")


def find_idle(t: object, weight: object = 1.0) -> list[str]:
    config = load_config(
        {
            "merge_method": "dare_ties",
            "base_model": "a",
            "models": [{"model": "b", "parameters": {"weight": weight}}],
            "parameters": {"density": t},
        }
    )
    return warn_of_idle_filters(config, lambda: NAMES)


def test_filters_that_match_nothing_are_named_once() -> None:
    rules = [{"filter": name, "value": 0.1} for name in ("mlp", "regex:layers.*up", "glob:*norm*")]
    assert find_idle([*rules, {"value": 0.5}]) == []
    assert find_idle([*rules, {"filter": "*", "value": 0.5}]) == []
    found = find_idle(
        [{"filter": "mpl", "value": 0.1}, {"value": 0.5}], [{"filter": "glob:norm", "value": 2}, {"value": 1}]
    )
    assert found == [
        'density: the filter "mpl" matches no tensor, so its value is not used',
        'weight: the filter "glob:norm" matches no tensor, so its value is not used',
    ]


def test_a_plan_warns_of_them(tmp_path: Path) -> None:
    one, other = (str(path) for path in write_family(tmp_path)[:2])
    rules = [{"filter": "mpl", "value": 0.1}, {"filter": "mlp", "value": 0.2}, {"value": 0.5}]
    config = {
        "merge_method": "slerp",
        "base_model": one,
        "models": [{"model": one}, {"model": other}],
        "parameters": {"t": rules},
    }
    assert raymerge.plan(config).warnings == ('t: the filter "mpl" matches no tensor, so its value is not used',)
