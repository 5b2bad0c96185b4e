"""Groups of elements of which each keeps its largest."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel
from raymerge.ops.registry import find_op
from raymerge.testing import draw_models, merge_in_every_way
from tests.ops.engine import Engine, run_kernel
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact


def make_kernel(num_kept: tuple[int, ...], group: int) -> Kernel:
    return find_op("cabs").kernel({"weight": (1.0,) * len(num_kept), "n_val": num_kept, "m_val": group, "lambda": 1.0})


def test_a_worked_example() -> None:
    """Two of each four, and one of the two that are left; what the first model has taken, the second cannot."""
    base = torch.zeros(6)
    first = torch.tensor([4.0, -3, 2, 1, 5, 6])
    second = torch.tensor([9.0, 8, 0.5, -0.5, 7, 0])
    merged = run_kernel(make_kernel((2, 2), 4), [base, first, second])
    assert merged.tolist() == [4, -3, 0.5, -0.5, 7, 6]


@pytest.mark.parametrize("group", [1, 3, 1000, BLOCK_ELEMENTS])
def test_groups_of_any_size_equal_the_formula(group: int) -> None:
    num_kept = (group // 3 or 1, group // 2, group)
    tensors = make_fine_tunes(2 * BLOCK_ELEMENTS + 77, 3)
    exact = find_exact("cabs", tensors, {"n_val": num_kept, "m_val": group})
    whole = Engine(tensors, cuts=[-(-tensors[0].numel() // make_kernel(num_kept, group).grid(None))])  # type: ignore[arg-type]
    for merged in (run_kernel(make_kernel(num_kept, group), tensors), whole.run(make_kernel(num_kept, group))[0]):
        assert ((merged.double() - exact.values).abs() <= 1e-6 * exact.terms).all()


def test_no_largest_hides_nan() -> None:
    base, model = torch.zeros(8), torch.arange(8.0)
    model[2] = math.nan
    merged = run_kernel(make_kernel((1, 1), 4), [base, model, model.clone()])
    assert merged.isnan().nonzero().tolist() == [[2]]


def test_writes_the_same_bytes_in_every_way(tmp_path: Path) -> None:
    models = draw_models(tmp_path, 3)
    listed = [{"model": model} for model in models[1:]]
    config = {"merge_method": "cabs", "base_model": models[0], "models": listed, "parameters": {"m_val": 300}}
    merge_in_every_way(config, tmp_path / "out")


@pytest.mark.parametrize(("num_kept", "group"), [((3,), 2), ((-1,), 2), ((0,), 0), ((0,), 2**17 + 1)])
def test_refuses_what_makes_no_sense(num_kept: tuple[int, ...], group: int) -> None:
    with pytest.raises(OpParameterError, match="n_val"):
        make_kernel(num_kept, group)
