from __future__ import annotations

import pytest

import raymerge
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.search.recipe import read_recipe
from raymerge.pipeline.search.space import Choices, Interval

RECIPE = """
merge_method: slerp
base_model: a
models: [{model: a}, {model: b}]
parameters: {t: 0.5}
search:
  parameters:
    t: {min: 0, max: 1}
    density: {min: 0.001, max: 1, log: true}
    seed: {min: 1, max: 9, step: 2}
    merge_method: [slerp, ties]
    "t[mlp]": [0.1, [0, 1]]
"""


def test_a_recipe_is_read_and_composed() -> None:
    recipe = read_recipe(RECIPE, is_soup=False)
    assert recipe.space == {
        "t": Interval(0, 1, None, is_log=False, is_whole=False),
        "density": Interval(0.001, 1, None, is_log=True, is_whole=False),
        "seed": Interval(1, 9, 2, is_log=False, is_whole=True),
        "merge_method": Choices(('"slerp"', '"ties"')),
        "t[mlp]": Choices(("0.1", "[0, 1]")),
    }
    composed = recipe.compose({"trial-0000": {"t": 0.25}})
    assert isinstance(composed, dict)
    assert "search" not in composed
    assert composed["sweep"] == {"points": {"trial-0000": {"t": 0.25}}}


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ("", "no `search:` section"),
        ("serch: {parameters: {t: [0, 1]}}", "^line 2: serch: unknown key; did you mean 'search'"),
        ("search: {parameters: {}}", "names no parameters"),
        ("search: {parameter: {t: [1, 2]}}", "line 2.*unknown key"),
        ("search: {parameters: {t: 0.5}}", r"search\.parameters\.t.*write {min: 0, max: 1}"),
        ("search: {parameters: {t: [0.5]}}", "at least two"),
        ("search: {parameters: {t: [1, 1]}}", "listed twice"),
        ("search: {parameters: {t: {min: 1, max: 0}}}", "min is 1 and max 0"),
        ("search: {parameters: {t: {min: 0, max: .inf}}}", "max is .*; a number is needed"),
        ("search: {parameters: {t: {min: 0, max: 1, steps: 3}}}", "steps.*unknown key"),
        ("search: {parameters: {t: {min: 0, max: 1, step: 0}}}", "above 0"),
        ("search: {parameters: {t: {min: 0, max: 1, log: true}}}", "begins above 0"),
        ("search: {parameters: {t: [1, 2]}}\nsweep: {grid: {t: [1, 2]}}", "as well as"),
    ],
)
def test_what_is_wrong_is_told(section: str, said: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){said}"):
        read_recipe(f"merge_method: slerp\n{section}\n", is_soup=False)


def test_merge_says_what_to_do_with_a_recipe() -> None:
    with pytest.raises(ConfigError, match="`raymerge search CONFIG OUT --task TASK` tries it"):
        raymerge.plan(RECIPE)


def test_every_path_that_names_nothing_is_told_with_its_line_before_anything_is_sampled() -> None:
    wrong = (
        RECIPE.replace("    t: {", "    tt: {").replace("density", "densty").replace("[slerp, ties]", "[slrp, ties]")
    )
    with pytest.raises(ConfigError) as told:
        read_recipe(wrong, is_soup=False)
    for said in (
        "line 8: tt: the config has no 'tt'; did you mean 't'?",
        "line 9: densty: the config has no 'densty'; did you mean 'density'?",
        "line 11: merge_method: there is no method \"slrp\"; did you mean 'slerp'?",
        "    8 |     tt: {min: 0, max: 1}",
    ):
        assert said in str(told.value)
    assert str(told.value).count("line ") == 3


def test_a_soup_needs_a_method_with_a_weight_for_each_model() -> None:
    recipe = "merge_method: slerp\nbase_model: a\nmodels: [{model: a}, {model: b}]\n"
    with pytest.raises(ConfigError, match=r"a soup averages models by a weight for each, and slerp takes t; write m"):
        read_recipe(recipe, is_soup=True)
    assert not read_recipe(recipe.replace("slerp", "linear"), is_soup=True).space
