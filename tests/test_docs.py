"""The docs name what there is."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.core import TyperGroup, TyperOption
from typer.main import get_command

from raymerge.ops.registry import load_ops
from raymerge.pipeline.cli.app import commands

ROOT = Path(__file__).parents[1]
METHOD_ROWS = {
    row[0].strip("` "): row
    for line in (ROOT / "docs/methods.md").read_text().splitlines()
    if line.startswith("| `")
    for row in [[cell.strip() for cell in line.strip("|").split("|")]]
}


def test_methods_has_a_row_for_each_op_and_no_other() -> None:
    assert METHOD_ROWS.keys() == load_ops().keys()


@pytest.mark.parametrize("name", load_ops())
def test_a_row_names_every_parameter(name: str) -> None:
    accepted = {"int8_mask"}
    if name == "task_arithmetic":
        accepted |= {"density", "rescale"}  # accepted without effect, as in mergekit
    _, _, _, per_model, shared, _ = METHOD_ROWS[name]
    for parameter in load_ops()[name].parameters:
        if parameter.name not in accepted:
            cell = per_model if parameter.per_model else shared
            assert f"`{parameter.name}`" in cell, (name, parameter.name)


@pytest.mark.parametrize("name", load_ops())
def test_a_row_leads_to_the_paper(name: str) -> None:
    assert load_ops()[name].reference in METHOD_ROWS[name][1]


def test_readme_names_every_option_of_merge() -> None:
    readme = (ROOT / "README.md").read_text()
    group = get_command(commands)
    assert isinstance(group, TyperGroup)
    for parameter in group.commands["merge"].params:
        if isinstance(parameter, TyperOption) and not parameter.hidden:
            assert any(f"`{option}" in readme for option in parameter.opts), parameter.opts


@pytest.mark.parametrize(
    "page",
    [
        *("README.md", "CONTRIBUTING.md"),
        *(f"docs/{name}.md" for name in ("methods", "mergekit", "modules", "moe", "batch", "cluster")),
    ],
)
def test_links_and_named_files_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    names = re.findall(r"\]\(((?!http)[^)#]+)\)", text) + re.findall(
        r"`((?:tests|benchmarks|docs|ops)/[\w/.]+\.\w+)`", text
    )
    for name in names:
        base = ROOT if "`" + name + "`" in text else (ROOT / page).parent
        assert (base / name).exists(), name


def test_the_readme_counts_the_methods() -> None:
    found = re.search(r"all of its (\d+) methods and \[(\d+) more\]", (ROOT / "README.md").read_text())
    assert found
    assert int(found[1]) == 20, "as mergekit 0.1.5 has"
    assert int(found[1]) + int(found[2]) == len(load_ops())
