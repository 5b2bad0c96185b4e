"""Methods that merge whole matrices: their formulas, their edges, and what they promise."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.matrix import STRIP_ELEMENTS
from raymerge.ops.registry import find_op
from raymerge.pipeline.driver import plan
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.options import MergeOptions
from raymerge.testing import draw_models, merge_in_every_way
from tests.ops.engine import Engine, run_kernel
from tests.ops.kernel_contract import CHECKS, Case
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

SETTINGS: list[tuple[str, dict[str, Any], int]] = [
    ("tsv", {}, 3),
    ("tsv", {"lambda": 0.7}, 7),
    ("iso_c", {}, 3),
    ("iso_cts", {}, 3),
    ("iso_cts", {"common_space_fraction": 0.3}, 4),
    ("star", {}, 3),
    ("star", {"eta": 90.0}, 2),
    ("wudi", {}, 3),
    ("knots", {"weight": (1.0, 0.5, 0.8), "density": (0.3, 0.6, 1.0)}, 3),
    ("knots", {}, 2),
]
"""Ops with parameters and a number of models."""
OPS = sorted({op for op, _, _ in SETTINGS})
SHAPES = [(300, 40), (40, 300), (110, 110), (3, 80, 50), (50, 240), (12_000,)]
TALL = (STRIP_ELEMENTS // 64 * 2 + 1000, 64)
"""Read in three blocks."""


def make_kernel(op: str, parameters: dict[str, Any], num_models: int = 2) -> Kernel:
    defaults: dict[str, Any] = {
        p.name: (p.default,) * num_models if p.per_model else p.default for p in find_op(op).parameters
    }
    return find_op(op).kernel(defaults | parameters)


def make_tensors(shape: tuple[int, ...], num_models: int) -> list[torch.Tensor]:
    return [x.reshape(shape) for x in make_fine_tunes(math.prod(shape), num_models, dtype=torch.float32)]


def make_low_rank(shape: tuple[int, int], rank: int, num_models: int) -> list[torch.Tensor]:
    """Return zeros and models of a rank."""
    random = torch.Generator().manual_seed(1)
    rows, columns = shape
    factors = [
        (torch.randn(rows, rank, generator=random), torch.randn(rank, columns, generator=random))
        for _ in range(num_models)
    ]
    return [torch.zeros(shape), *(left @ right for left, right in factors)]


def measure_error(merged: torch.Tensor, expected: torch.Tensor, base: torch.Tensor) -> float:
    """Return the norm of the difference as a share of what the merge changed."""
    return float((merged - expected).norm() / (expected - base).norm())


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("shapes", [SHAPES[:1], SHAPES[1:2], SHAPES[3:]], ids=["tall", "wide", "others"])
@pytest.mark.parametrize(("op", "parameters", "num_models"), [SETTINGS[k] for k in (1, 2, 4, 5, 7, 8)])
def test_every_setting(
    op: str,
    parameters: dict[str, Any],
    num_models: int,
    shapes: list[tuple[int, ...]],
    check: Callable[[Case], None],
) -> None:
    check(
        Case(
            make_kernel(op, parameters),
            lambda n: make_fine_tunes(n, num_models, dtype=torch.float32),
            [make_kernel(op, {**parameters, "lambda": 0.3})],
            shapes,
            again=lambda: make_kernel(op, parameters),
        )
    )


@pytest.mark.parametrize("shape", [*SHAPES, TALL, (1, 500), (500, 1), (2, 900)])
@pytest.mark.parametrize(("op", "parameters", "num_models"), SETTINGS)
def test_every_setting_equals_its_formula(
    op: str, parameters: dict[str, Any], num_models: int, shape: tuple[int, ...]
) -> None:
    if (op, shape) in {("iso_cts", (2, 900)), ("wudi", TALL)}:
        return  # fewer directions than models; the formula takes the square of the rows
    tensors = make_tensors(shape, num_models)
    merged = run_kernel(make_kernel(op, parameters), tensors)
    assert measure_error(merged.double(), find_exact(op, tensors, parameters).values, tensors[0].double()) < 1e-4


def test_many_blocks_at_once_are_the_same_as_one_by_one() -> None:
    tensors = make_tensors(TALL, 3)
    whole, single = (Engine(tensors, cuts=cuts).run(make_kernel("tsv", {}))[0] for cuts in ([3], []))
    assert measure_error(whole, single, tensors[0]) < 1e-6


@pytest.mark.parametrize("shape", [(60, 40), (40, 60)])
class TestEdges:
    @pytest.mark.parametrize("op", ["tsv", "star", "wudi", "knots"])
    def test_one_model_alone_comes_back(self, op: str, shape: tuple[int, int]) -> None:
        base, model = make_tensors(shape, 1)
        merged = run_kernel(make_kernel(op, {"eta": 100.0} if op == "star" else {}, 1), [base, model])
        assert measure_error(merged, model, base) < 1e-5

    def test_tsv_of_orthogonal_tasks_is_their_sum(self, shape: tuple[int, int]) -> None:
        """Models of low rank whose directions have nothing in common do not disturb each other."""
        base = torch.zeros(shape)
        models = [base.clone(), base.clone()]
        models[0][:5, :7] = make_low_rank((5, 7), 4, 1)[1]
        models[1][9:20, 9:20] = make_low_rank((11, 11), 6, 1)[1]
        merged = run_kernel(make_kernel("tsv", {}), [base, *models])
        assert measure_error(merged, models[0] + models[1], base) < 1e-5

    @pytest.mark.parametrize("op", OPS)
    def test_a_low_rank_stays_low(self, op: str, shape: tuple[int, int]) -> None:
        """Directions in which no model differs from the base stay as they are."""
        tensors = make_low_rank(shape, 3, 2)
        merged = run_kernel(make_kernel(op, {}), tensors).double()
        assert torch.linalg.matrix_rank(merged, rtol=1e-5) <= 6
        spanned = torch.linalg.svd(torch.cat(tensors[1:], 1).double(), full_matrices=False)[0][:, :6]
        assert (merged - spanned @ (spanned.T @ merged)).norm() < 1e-5 * merged.norm()
        if op == "iso_c":
            strengths = torch.linalg.svdvals(merged)[:6]
            total = torch.linalg.svdvals((tensors[1] + tensors[2]).double())
            torch.testing.assert_close(strengths, (total.sum() / 6).expand(6), rtol=1e-5, atol=0)

    @pytest.mark.parametrize("op", OPS)
    def test_equal_models_count_as_one_direction_each(self, op: str, shape: tuple[int, int]) -> None:
        base, model = make_tensors(shape, 1)
        merged = [run_kernel(make_kernel(op, {}), [base, model, model.clone()]) for _ in range(2)]
        assert merged[0].isfinite().all()
        assert (
            torch.linalg.svdvals((merged[0] - base).double())[0] < 3 * torch.linalg.svdvals((model - base).double())[0]
        )

    @pytest.mark.parametrize("op", OPS)
    def test_nan_is_told_by_nan(self, op: str, shape: tuple[int, int]) -> None:
        base, one, other = make_tensors(shape, 2)
        other[3, 4] = math.nan
        assert run_kernel(make_kernel(op, {}), [base, one, other]).isnan().all()


def test_wudi_is_where_gradient_descent_ends() -> None:
    """From the sum of the deltas, down the paper's objective; here with few directions, so that it gets there."""
    base, *models = make_low_rank((12, 30), 3, 2)
    deltas = torch.stack([model - base for model in models]).double()
    squares = deltas.square().sum((1, 2), keepdim=True)
    found = deltas.sum(0)
    for _ in range(2_000):
        gradient = ((found - deltas) @ deltas.mT @ deltas / squares).sum(0)
        found = found - gradient
    merged = run_kernel(make_kernel("wudi", {}), [base, *models])
    assert measure_error(merged.double(), found, base.double()) < 1e-5


@pytest.mark.parametrize("op", ["tsv", "iso_c", "knots"])
def test_writes_the_same_bytes_in_every_way(op: str, tmp_path: Path) -> None:
    """On one machine, whatever the memory, the workers and the windows."""
    models = draw_models(tmp_path, 3)
    config = {"merge_method": op, "base_model": models[0], "models": [{"model": model} for model in models[1:]]}
    merge_in_every_way(config, tmp_path / "out")


def test_the_least_memory_is_told_with_the_tensor(tmp_path: Path) -> None:
    models = draw_models(tmp_path, 3, {"small": (20, 30), "wide": (500, 900)})
    config = {"merge_method": "tsv", "base_model": models[0], "models": [{"model": model} for model in models[1:]]}
    with pytest.raises(MemoryLimitError, match=r"wide needs .* the smallest limit that works is --memory"):
        plan(config, MergeOptions(workers=1), memory="30MiB")


@pytest.mark.parametrize(
    ("op", "parameters"),
    [("iso_cts", {"common_space_fraction": 1.5}), ("star", {"eta": 140.0}), ("star", {"eta": -1.0})],
)
def test_refuses_what_makes_no_sense(op: str, parameters: dict[str, Any]) -> None:
    with pytest.raises(OpParameterError, match=next(iter(parameters))):
        make_kernel(op, parameters)
