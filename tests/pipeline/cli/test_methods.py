"""What `raymerge methods` tells: all that ops declare, and YAMLs that can be copied."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from raymerge.ops.kernel import Site
from raymerge.ops.registry import Base, Op, load_ops
from raymerge.pipeline.cli.methods import make_example, measure_demand
from raymerge.pipeline.config.reader import load_config
from tests.commands import Cli
from tests.ops.samples import make_kernel, num_sample_models

OPS = list(load_ops().values())


def test_the_table_has_a_line_for_each(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "110")
    outcome = cli("methods")
    assert (outcome.code, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert max(map(len, lines)) <= 110
    by_name = {words[0]: words[1:6] for line in lines if len(words := line.split()) > 5}
    assert load_ops().keys() <= by_name.keys()
    assert by_name["ties"] == ["0+", "required", "2", "blocks", "compiled"]
    assert by_name["della"] == ["0+", "required", "1", "rows", "compiled"]
    assert by_name["cabs"] == ["1+", "required", "0", "blocks", "torch"]
    assert by_name["slerp"] == ["1", "required", "1", "blocks", "compiled"]
    assert by_name["linear"] == ["1+", "none", "0", "blocks", "compiled"]


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_a_page_has_all_that_is_declared(op: Op, cli: Cli) -> None:
    page = cli("methods", op.name).out
    words = " ".join(page.split())
    for text in (op.title, op.summary, *op.details.split("\n\n"), op.formula, op.when, op.not_when, op.source):
        assert " ".join(text.split()) in words
    assert op.reference in page
    for parameter in op.parameters:
        (line,) = [line for line in page.splitlines() if line.startswith(f"    {parameter.name} ") and ";" in line]
        assert ("for each model" in line) == parameter.per_model
        assert ("required" in line) == (parameter.default is None)
        assert parameter.range is None or str(parameter.range) in line
        assert " or ".join(parameter.choices) in line
    assert all(f"    {line}" in page.splitlines() for line in make_example(op).splitlines())


@pytest.mark.parametrize(
    ("name", "models"), [("linear", "1 or more"), ("slerp", "a base and exactly 1"), ("nuslerp", "a base or none, and")]
)
def test_a_page_says_how_many_models_it_takes(name: str, models: str, cli: Cli) -> None:
    assert f"  models    {models}" in cli("methods", name).out


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_the_example_is_a_merge_without_any_warning(op: Op) -> None:
    config = load_config(make_example(op), strict=True)
    assert config.method == op.name
    assert (config.base_model is not None) == (op.base is Base.REQUIRED)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_says_what_the_kernel_says(op: Op) -> None:
    family, demand = measure_demand(op)
    kernel = make_kernel(op)
    site = Site("w", (300, 40_000), num_sample_models(op) + (op.base is Base.REQUIRED), 0)
    assert family == kernel.family
    assert demand.is_compiled == bool(kernel.loop_dtypes)
    assert (demand.held == "rows") == (kernel.grid(site) == 120_000)
    if op.max_models is not None:
        assert demand.scratch == kernel.num_scratch(site)
    if op.name != "sce":  # of which the example selects, and the sample takes all
        assert demand.passes == kernel.num_passes(site)


def test_json_says_the_same(cli: Cli) -> None:
    found = {entry["name"]: entry for entry in json.loads(cli("methods", "--json").out)}
    assert found.keys() == load_ops().keys()
    assert [found["ties"]] == json.loads(cli("methods", "ties", "--json").out)
    ties = found["ties"]
    assert (ties["base"], ties["min_models"], ties["max_models"]) == ("required", 0, None)
    assert ties["cost"] == {
        "passes": 2, "is_compiled": True, "held": "blocks", "scratch": 5, "scratch_per_model": 1,
    }  # fmt: skip
    density = {"name": "density", "type": "float", "per_model": True, "default": 1.0, "choices": None, "range": [0, 1]}
    assert density in ties["parameters"]
    assert yaml.safe_load(ties["example"])["models"][0]["parameters"] == {"weight": 0.5, "density": 0.5}
    epsilon = found["ram"]["parameters"][0]
    assert (epsilon["name"], epsilon["range"]) == ("epsilon", [0, None])


def test_knows_methods_of_ones_own(cli: Cli, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "from raymerge.ops.kernels.linear import LinearCombination\n"
        "from raymerge.ops.registry import Base, merge_op\n"
        '@merge_op(title="Mine", base=Base.INPUT, min_models=2, max_models=2)\n'
        "def mine(share: float = 0.25):\n"
        '    """Mixes two models.\n\n    Formula: y = x_0 + share * x_1.\n    """\n'
        "    return LinearCombination((1.0, share))\n"
    )
    assert "\n  mine " in cli("methods", "--ops", str(file)).out
    page = cli("methods", "mine", "--ops", str(file)).out
    assert "  formula   y = x_0 + share * x_1." in page
    assert "merge_method: mine" in page
    assert cli("methods", "mine").code == 2


def test_an_unknown_name(cli: Cli) -> None:
    outcome = cli("methods", "tise")
    assert outcome.code == 2
    assert "did you mean 'ties'" in outcome.err
