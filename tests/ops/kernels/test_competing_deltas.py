"""Elements that compete by size and agreement."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel
from raymerge.ops.kernels.competing_deltas import _find_tanh
from raymerge.ops.registry import find_op
from raymerge.testing import draw_models, merge_in_every_way
from tests.ops.engine import run_kernel


def make_kernel(*densities: float) -> Kernel:
    return find_op("pcb").kernel({"density": densities, "lambda": 1.0})


def test_what_models_agree_on_wins_over_what_is_as_large() -> None:
    """All sizes are between the ends that are cut off; the largest agreement has the weight 1, dissent has none."""
    base, one, other = torch.zeros(12), torch.zeros(12), torch.zeros(12)
    one[:6] = torch.tensor([9.0, 9, 2, 1, 1, 1])
    other[:6] = torch.tensor([9.0, 9, -2, 1, 3, 0])
    merged = run_kernel(make_kernel(0.5, 0.5), [base, one, other])
    assert merged[:2].tolist() == [9, 9]
    assert merged[2] == 0
    assert merged[4] > 1, "the larger of two that agree counts more"
    assert not merged[6:].any()


def test_the_hyperbolic_tangent() -> None:
    x = torch.linspace(-6, 6, 4001, dtype=torch.float64)
    for scale in (1, 1e-3, 1e-9):
        torch.testing.assert_close(_find_tanh(x * scale), torch.tanh(x * scale), rtol=1e-9, atol=0)


def test_nan_is_told_where_it_is() -> None:
    base, model = torch.zeros(BLOCK_ELEMENTS + 5), torch.arange(BLOCK_ELEMENTS + 5.0)
    other = model.clone()
    other[7] = math.nan
    assert run_kernel(make_kernel(0.3, 0.3), [base, model, other]).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("num_elements", [1, 2, 3])
def test_tensors_of_hardly_any_elements(num_elements: int) -> None:
    base = torch.zeros(num_elements)
    merged = run_kernel(make_kernel(1.0, 1.0), [base, base + 2, base + 2])
    assert merged.tolist() == [2.0] * num_elements


def test_nothing_kept_is_the_base() -> None:
    base = torch.arange(5.0)
    assert torch.equal(run_kernel(make_kernel(0.0, 0.0), [base, base + 1, base - 1]), base)


def test_writes_the_same_bytes_in_every_way(tmp_path: Path) -> None:
    models = draw_models(tmp_path, 3)
    listed = [{"model": model} for model in models[1:]]
    merge_in_every_way({"merge_method": "pcb", "base_model": models[0], "models": listed}, tmp_path / "out")


def test_refuses_what_is_no_share() -> None:
    with pytest.raises(OpParameterError, match="density"):
        make_kernel(1.5)
