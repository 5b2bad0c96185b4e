"""Methods that go by angles: with a base, by rows and by columns, and at their edges."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel
from raymerge.ops.registry import find_op
from tests.ops.engine import Engine, run_kernel
from tests.ops.kernel_contract import CHECKS, Case, assert_close
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

ROWS = {"nuslerp_flatten": False}
COLUMNS = {"nuslerp_flatten": False, "nuslerp_row_wise": True}
SETTINGS: list[tuple[str, dict[str, Any], int]] = [
    ("nuslerp", {"weight": (0.5, 0.3)}, 3),
    ("nuslerp", {"weight": (0.5, 0.3), **ROWS}, 2),
    ("nuslerp", {"weight": (0.5, 0.3), **ROWS}, 3),
    ("nuslerp", {"weight": (0.5, 0.3), **COLUMNS}, 2),
    ("nuslerp", {"weight": (0.5, 0.3), **COLUMNS}, 3),
    ("multislerp", {"weight": (0.5, 0.3, 0.4)}, 4),
    ("multislerp", {"weight": (0.5, 0.3, 0.4), "normalize_weights": False, "eps": 0.1}, 3),
    ("model_stock", {"filter_wise": True}, 4),
    ("karcher", {}, 6),
]
"""Ops with parameters and a number of sources, some of which are a base and its models."""


def make_kernel(op: str, parameters: dict[str, Any]) -> Kernel:
    return find_op(op).kernel({p.name: p.default for p in find_op(op).parameters if p.default is not None} | parameters)


def make_case(op: str, parameters: dict[str, Any], num_sources: int) -> Case:
    return Case(
        make_kernel(op, parameters),
        lambda n: make_fine_tunes(n, num_sources - 1, dtype=torch.float32),
        [make_kernel(op, {**parameters, "weight": (0.1, 0.7, 0.2)[: len(parameters["weight"])]})]
        if "weight" in parameters
        else [],
        again=lambda: make_kernel(op, parameters),
        has_columns="nuslerp_row_wise" in parameters,
    )


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize(("op", "parameters", "num_sources"), SETTINGS)
def test_every_setting(op: str, parameters: dict[str, Any], num_sources: int, check: Callable[[Case], None]) -> None:
    check(make_case(op, parameters, num_sources))


@pytest.mark.parametrize("shape", [(300, 501), (700, 2, 300), (150_003,), (7, 20_001)])
@pytest.mark.parametrize(("op", "parameters", "num_sources"), SETTINGS)
def test_every_setting_equals_its_formula(
    op: str, parameters: dict[str, Any], num_sources: int, shape: tuple[int, ...]
) -> None:
    sources = make_fine_tunes(math.prod(shape), num_sources - 1, dtype=torch.float32)
    tensors = [source.reshape(shape) for source in sources]
    merged = run_kernel(make_kernel(op, parameters), tensors)
    assert_close(merged, find_exact(op, tensors, parameters))


@pytest.mark.parametrize("shape", [(3, 30_000), (30_000, 3), (900, 1), (1, 900)])
@pytest.mark.parametrize(("op", "parameters", "num_sources"), SETTINGS)
def test_short_rows_and_columns(op: str, parameters: dict[str, Any], num_sources: int, shape: tuple[int, ...]) -> None:
    """Where angles between a few numbers are ill-conditioned, no float32 is exact; that is seldom."""
    sources = make_fine_tunes(math.prod(shape), num_sources - 1, dtype=torch.float32)
    tensors = [source.reshape(shape) for source in sources]
    exact = find_exact(op, tensors, parameters)
    error = (run_kernel(make_kernel(op, parameters), tensors).double() - exact.values).abs()
    assert (error <= 2e-6 * exact.terms).double().mean() > 0.99


def test_a_row_longer_than_a_block_is_one_block() -> None:
    sources = make_fine_tunes(2 * (BLOCK_ELEMENTS + 77), 1, dtype=torch.float32)
    tensors = [source.reshape(2, -1) for source in sources]
    parameters = {"weight": (1.0, 2.0), **ROWS}
    kernel = make_kernel("nuslerp", parameters)
    assert_close(run_kernel(kernel, tensors), find_exact("nuslerp", tensors, parameters))
    for k in range(2):
        alone = run_kernel(kernel, [tensor[k] for tensor in tensors])
        assert torch.equal(alone, run_kernel(kernel, tensors)[k])


def test_figures_tell_norms_and_the_mean_cosine_of_differences() -> None:
    tensors = make_fine_tunes(150_001, 3, dtype=torch.float32)
    engine = Engine(tensors)
    engine.run(make_kernel("model_stock", {}))
    deltas = [(x - tensors[0]).double() for x in tensors[1:]]
    cosines = [float(a @ b / a.norm() / b.norm()) for k, a in enumerate(deltas) for b in deltas[:k]]
    assert engine.figures[0]["cosine"] == pytest.approx(sum(cosines) / 3, abs=1e-8)
    assert engine.figures[0]["norm[2]"] == pytest.approx(float(deltas[2].norm()), rel=1e-7)
    assert len(engine.figures[0]) == 4


V = torch.randn(1000, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(1000, generator=torch.Generator().manual_seed(2))
ZEROS = torch.zeros(1000)


@pytest.mark.parametrize("parameters", [{}, ROWS, COLUMNS], ids=str)
def test_nuslerp_takes_the_chord_between_opposite_vectors(parameters: dict[str, Any]) -> None:
    kernel = make_kernel("nuslerp", {"weight": (1.0, 3.0), **parameters})
    shape = (1000, 1) if parameters == COLUMNS else (1000,)
    for factor in (-1.0, -3.0):
        merged = run_kernel(kernel, [V.reshape(shape), factor * V.reshape(shape)])
        torch.testing.assert_close(merged.reshape(-1), (0.25 + 0.75 * factor) * V)


def test_nuslerp_halves_where_weights_cancel() -> None:
    half = run_kernel(make_kernel("nuslerp", {"weight": (1.0, 1.0)}), [V, OTHER])
    assert torch.equal(run_kernel(make_kernel("nuslerp", {"weight": (0.7, -0.7)}), [V, OTHER]), half)


def test_nuslerp_takes_a_zero_vector_as_orthogonal() -> None:
    merged = run_kernel(make_kernel("nuslerp", {"weight": (1.0, 1.0)}), [ZEROS, V])
    torch.testing.assert_close(merged, V * math.sqrt(0.5))


def test_multislerp_adds_two_opposite_models_and_refuses_three_that_cancel() -> None:
    merged = run_kernel(make_kernel("multislerp", {"weight": (1.0, 1.0)}), [V, -3 * V])
    torch.testing.assert_close(merged, -V)
    with pytest.raises(OpParameterError, match=r"weighted by 0\.25, 0\.25, 0\.5, cancel, and have no mean"):
        run_kernel(make_kernel("multislerp", {"weight": (1.0, 1.0, 2.0)}), [V, 2 * V, -V])


def test_multislerp_gives_the_base_where_no_model_differs_and_one_model_as_it_is() -> None:
    assert torch.equal(run_kernel(make_kernel("multislerp", {"weight": (1.0,) * 3}), [V] * 4), V)
    assert torch.equal(run_kernel(make_kernel("multislerp", {"weight": (0.0,)}), [V]), V)
    torch.testing.assert_close(run_kernel(make_kernel("multislerp", {"weight": (3.0,)}), [OTHER, V]), V)


def test_multislerp_refuses_weights_that_cancel() -> None:
    with pytest.raises(OpParameterError, match=r"0\.5, -0\.5 sum to 0, .* or set normalize_weights: false"):
        make_kernel("multislerp", {"weight": (0.5, -0.5)})
    with pytest.raises(OpParameterError, match="eps = -1 must not be negative"):
        make_kernel("multislerp", {"weight": (0.5, 0.5), "eps": -1.0})


def test_karcher_counts_zeros_in_the_norm_alone() -> None:
    merged = run_kernel(make_kernel("karcher", {}), [V, ZEROS, V])
    torch.testing.assert_close(merged, V * (2 / 3))


def test_karcher_keeps_the_first_of_two_opposite_directions() -> None:
    torch.testing.assert_close(run_kernel(make_kernel("karcher", {}), [V, -3 * V]), 2 * V)


def test_karcher_stops_after_its_steps() -> None:
    apart = [V, OTHER, V + 3 * OTHER]
    start = run_kernel(make_kernel("karcher", {"max_iter": 0}), apart).double()
    units = torch.stack([x.double() / x.double().norm() for x in apart])
    assert torch.nn.functional.cosine_similarity(start, units.mean(0), dim=0) == pytest.approx(1, abs=1e-9)
    assert not torch.equal(run_kernel(make_kernel("karcher", {}), apart).double(), start)
    with pytest.raises(OpParameterError, match="max_iter = -1 and tol = 1e-05 must not be negative"):
        make_kernel("karcher", {"max_iter": -1})


def test_model_stock_keeps_the_base_where_differences_are_tiny_or_angles_leave_nothing() -> None:
    base = torch.ones(1000)
    tiny = [base, *(base + 2.0**-23 * torch.ones(1000).cumsum(0).remainder(2 + k).floor() for k in range(2))]
    moved = run_kernel(make_kernel("model_stock", {}), tiny)
    assert float((moved - base).abs().max()) <= 2.0**-23
    opposite = [base, base + 0.5, base - 0.5]
    assert torch.equal(run_kernel(make_kernel("model_stock", {}), opposite), base)


def test_refuses_what_makes_no_sense() -> None:
    for weight in ((1.0, -0.5), (0.0, 0.0)):
        with pytest.raises(OpParameterError, match="must not be negative, and not all be 0"):
            make_kernel("geometric_median", {"weight": weight})
    with pytest.raises(OpParameterError, match="delta = -1 must not be negative"):
        make_kernel("assembly_of_experts", {"weight": (0.5,), "delta": -1.0})
