"""What `raymerge.testing` finds wrong with a method."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from raymerge.ops.errors import OpFileError
from raymerge.testing import SHAPES, draw_models, merge_in_every_way, read_model

OP = '''
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.registry import Base, merge_op

calls = []

@merge_op(title="Mine", base=Base.INPUT)
def mine():
    """A method."""
    return Elementwise(combine)

def combine(tensors, out, scratch):
    out.copy_(tensors[0]).add_(tensors[1])
'''
FAULTS = {
    "what it adds depends on the block": ("out.add_(out.abs().max())", "all blocks at once"),
    "it counts its calls": ("calls.append(1); out.add_(len(calls))", "processes|least|first"),
    "it draws from torch's generator": ("import torch; out.add_(torch.rand(1))", "least|processes"),
}


def merge_with(line: str, tmp_path: Path) -> tuple[list[str], dict[str, torch.Tensor]]:
    ops = tmp_path / "mine.py"
    ops.write_text(f"{OP}    {line}\n")
    models = draw_models(tmp_path, 2)
    config = {"merge_method": "mine", "models": [{"model": model} for model in models]}
    return models, merge_in_every_way(config, tmp_path / "out", ops=ops)


def test_returns_what_a_sound_method_makes(tmp_path: Path) -> None:
    models, merged = merge_with("out.mul_(0.5)", tmp_path)
    assert {name: tuple(x.shape) for name, x in merged.items()} == SHAPES
    a, b = map(read_model, models)
    assert all(torch.equal(x, (a[name] + b[name]) / 2) for name, x in merged.items())


@pytest.mark.parametrize("fault", FAULTS)
def test_finds_a_method_whose_bytes_depend_on_how_it_runs(fault: str, tmp_path: Path) -> None:
    line, where = FAULTS[fault]
    with pytest.raises(AssertionError, match=f"matrix.* of the merge '({where})' differ from those of 'plenty'"):
        merge_with(line, tmp_path)


def test_what_a_method_raises_is_told_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(OpFileError, match=r"mine\.py:14: mine, in model\.safetensors: ValueError: my mistake"):
        merge_with("raise ValueError('my mistake')", tmp_path)
