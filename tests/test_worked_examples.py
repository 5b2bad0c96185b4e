"""The worked examples of docs/methods.md, merged from files as they say."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import save_file

from raymerge import merge
from raymerge.ops.registry import Base, Op, load_ops
from raymerge.testing import read_model, write_model
from tests.documents import ROOT

Values = dict[str, torch.Tensor]
SECTION = (ROOT / "docs/methods.md").read_text().partition("## Worked examples\n")[2].partition("\n## ")[0]
INPUT = re.compile(r"^ +(\w+) += ([^=\n]+?)(?: {2,}.*)?$", re.MULTILINE)
EXAMPLE = re.compile(r"^ +(\w+)(?: of ([\w ]+?))?(?: +(\{.*\}))? +-> ([-\d. ;]+?)(?: +#.*)?$", re.MULTILINE)


def read_groups() -> list[tuple[Values, list[tuple[str, ...]]]]:
    """Return the inputs of each block of the page, with its examples: method, models, parameters and result."""
    blocks = re.findall(r"^```text\n(.*?)^```", SECTION, re.MULTILINE | re.DOTALL)
    return [({name: parse(x) for name, x in INPUT.findall(block)}, EXAMPLE.findall(block)) for block in blocks]


def parse(text: str) -> torch.Tensor:
    """Return a vector, or a matrix whose rows end with semicolons."""
    rows = [[float(number) for number in row.split()] for row in text.split(";")]
    return torch.tensor(rows if ";" in text else rows[0])


GROUPS = read_groups()
EXAMPLES = [pytest.param(inputs, *example, id=example[0]) for inputs, examples in GROUPS for example in examples]


def test_there_is_one_of_each_method() -> None:
    assert {example[0] for _, examples in GROUPS for example in examples} == load_ops().keys()
    lines = re.findall(r"->", SECTION)
    assert len(lines) == len(EXAMPLES), "a line is not read as an example"


@pytest.mark.parametrize(("inputs", "method", "models", "parameters", "result"), EXAMPLES)
def test_gives_what_the_page_says(
    inputs: Values, method: str, models: str, parameters: str, result: str, tmp_path: Path
) -> None:
    op = load_ops()[method]
    names = models.split() or ["x1", "x2"][: op.max_models]
    for name in dict.fromkeys(("b", *names)):
        write_model(tmp_path / name, {"w": inputs[name]})
    config: dict[str, Any] = {"merge_method": method, "parameters": yaml.safe_load(parameters or "{}")}
    if op.base is Base.REQUIRED:
        config["base_model"] = str(tmp_path / "b")
    config["models"] = [
        make_entry(op, config["parameters"], inputs, tmp_path / name, k) for k, name in enumerate(names)
    ]
    merge(config, tmp_path / "out", workers=1)
    merged = read_model(tmp_path / "out")["w"]
    torch.testing.assert_close(merged, parse(result), rtol=0, atol=6e-4)


def make_entry(op: Op, parameters: dict[str, Any], inputs: Values, model: Path, position: int) -> dict[str, Any]:
    """Return a model with what the page lists for each: a parameter's value, and statistics by their initial."""
    own = {
        p.name: parameters[p.name] for p in op.parameters if p.per_model and isinstance(parameters.get(p.name), list)
    }
    entry: dict[str, Any] = {
        "model": str(model),
        "parameters": {name: values[position] for name, values in own.items()},
    }
    if op.statistics is not None:
        path = model.with_suffix(".safetensors")
        save_file({"w": inputs[f"{op.statistics.key[0]}{position + 1}"]}, path)
        entry[op.statistics.key] = str(path)
    return entry
