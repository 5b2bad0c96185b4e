"""Values of a space that no model can be merged with, told by a function that refuses settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from raymerge.pipeline.search.checks import find_wrong_values, list_bases
from raymerge.pipeline.search.space import Choices, Interval, Space
from raymerge.pipeline.search.study import Settings


def find(space: Space, refuses: Callable[[Settings], str]) -> list[str]:
    def explain(settings: Mapping[str, Settings]) -> dict[str, str]:
        return {name: refuses(own) for name, own in settings.items()}

    return [said for _, said in find_wrong_values(space, list_bases(space, explain), explain)]


def choose(*values: str) -> Choices:
    return Choices(tuple(f'"{value}"' for value in values))


def test_a_value_that_works_with_one_value_of_another_path_is_not_wrong() -> None:
    methods = [f"m{k}" for k in range(20)]
    space = {"method": choose(*methods), "mode": choose("plain", "special", "never")}

    def refuse(own: Settings) -> str:
        is_right = own["mode"] == "plain" or (own["mode"] == "special" and own["method"] == "m13")
        return "" if is_right else f"{own['mode']} is not for {own['method']}"

    assert find(space, refuse) == ['search.parameters.mode: "never": never is not for m0']


def test_ends_that_are_refused_themselves_may_be_meant_as_open() -> None:
    space = {name: Interval(0.0, 1.0, None, is_log=False, is_whole=False) for name in ("a", "b")}
    assert not find(space, lambda own: "" if all(0 < float(str(value)) < 1 for value in own.values()) else "no")
    found = find(space, lambda own: "" if float(str(own["a"])) < 0.9 else "too much\nwarning: of something else")
    assert found == ["search.parameters.a: max 1: too much"]


def test_bases_are_found_where_one_value_of_each_path_works() -> None:
    space = {f"p{k}": choose(*(f"v{j}" for j in range(9))) for k in range(6)}

    def refuse(own: Settings) -> str:
        return "\n".join(f"{path}: no" for path, value in own.items() if value != "v5")

    found = find(space, refuse)
    assert len(found) == 6 * 8
    assert not any("v5" in said for said in found)
