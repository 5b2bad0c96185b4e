"""Task arithmetic on thinned-out deltas, with settings that tests/ops/test_kernel.py does not combine."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymerge.ops.kernel import Site
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import find_op
from tests.ops.engine import NAME, Engine, run_kernel
from tests.ops.kernel_contract import assert_close, assert_rounded_once
from tests.ops.loop_engine import LoopEngine
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

N = 150_001
SETTINGS: list[dict[str, Any]] = [
    {"weight": (1.0, 1.0, 1.0), "density": (0.5, 0.5, 0.5), "normalize": True, "rescale": False, "lambda": 1.0},
    {"weight": (0.3, 0.3, 0.3), "density": (0.5, 0.2, 1.0), "normalize": True, "rescale": True, "lambda": 0.5},
    {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.7, 0.01), "normalize": False, "rescale": True, "lambda": 1.0},
    {"weight": (0.5, 0.25, -0.5), "density": (0.5, 0.5, 1.5), "normalize": True, "rescale": False, "lambda": 1.3},
    {"weight": (0.3, 0.3, 0.3), "density": (0.9, 0.5, 0.5), "normalize": False, "rescale": False, "lambda": 1.0},
    {"weight": (1.0, -0.7, 0.2), "density": (0.1, 0.1, 0.1), "normalize": False, "rescale": False, "lambda": 0.7},
]


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def tensors(request: pytest.FixtureRequest) -> list[torch.Tensor]:
    return make_fine_tunes(N, 3, dtype=request.param, seed=7)


@pytest.mark.parametrize("op", ["task_arithmetic", "ties", "dare_linear", "dare_ties"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_equals_its_formula(tensors: list[torch.Tensor], op: str, settings: dict[str, Any]) -> None:
    exact = find_exact(op, tensors, settings, name=NAME, seed=5)
    merged = run_kernel(find_op(op).kernel(settings), tensors, seed=5)
    assert_close(merged, exact)
    assert_rounded_once(merged.bfloat16(), exact)


@pytest.mark.parametrize("op", ["ties", "dare_linear", "dare_ties"])
def test_drops_everything_at_density_zero(op: str) -> None:
    base, *models = make_fine_tunes(1000, 2, dtype=torch.float32)
    kernel = find_op(op).kernel({"weight": (1.0, 1.0), "density": (0.0, -1.0)})
    assert torch.equal(run_kernel(kernel, [base, *models]), base)


@pytest.mark.parametrize("op", ["task_arithmetic", "dare_linear"])
def test_weights_that_cancel_do_not_divide(op: str) -> None:
    base, *models = make_fine_tunes(1000, 2, dtype=torch.float32)
    kernel = find_op(op).kernel({"weight": (0.5, -0.5), "normalize": True})
    expected = base + 0.5 * (models[0] - base) - 0.5 * (models[1] - base)
    torch.testing.assert_close(run_kernel(kernel, [base, *models]), expected)


def test_a_draw_goes_to_the_positive_side() -> None:
    tensors = [torch.zeros(2), torch.tensor([1.0, -2.0]), torch.tensor([-1.0, 2.0])]
    assert run_kernel(find_op("ties").kernel({"weight": (1.0, 1.0)}), tensors).tolist() == [1.0, 2.0]


def test_only_what_decides_the_passes_keeps_kernels_apart() -> None:
    site = Site(NAME, (300, 500), 3, 0)
    ties, dare_ties, dare_linear = find_op("ties"), find_op("dare_ties"), find_op("dare_linear")
    parameters: dict[str, Any] = {"weight": (1.0, 0.5), "density": (0.5, 0.2)}
    measuring = ties.kernel(parameters).measuring(site)
    assert ties.kernel({"weight": (-2.0, 3.0), "density": (0.5, 0.2), "lambda": 0.1}).measuring(site) == measuring
    changes: list[dict[str, Any]] = [{"density": (0.5, 0.3)}, {"weight": (1.0, 0.0)}, {"rescale": True}]
    for change in changes:
        assert ties.kernel(parameters | change).measuring(site) != measuring
    assert dare_ties.kernel(parameters).measuring(site) == dare_linear.kernel(parameters).measuring(site) != measuring


def test_weights_of_zero_need_no_passes() -> None:
    site = Site(NAME, (300, 500), 3, 0)
    kernel = find_op("ties").kernel({"weight": (0.0, 1.0), "density": (0.5, 1.0)})
    assert kernel.num_passes(site) == kernel.state_nbytes(site) == 0


def test_reports_what_was_kept() -> None:
    base, first, second = make_fine_tunes(N, 2, dtype=torch.float32)
    second = base.clone()
    second[:100] += 1
    engine = Engine([base, first, second])
    engine.run(find_op("ties").kernel({"weight": (1.0, 1.0), "density": (0.2, 0.5), "rescale": True}))
    delta = (first - base).abs()
    kept = delta.sort(descending=True).values[: int(0.2 * N)]
    assert engine.figures[0] == {
        "kept[0]": int(0.2 * N) / N,
        "threshold[0]": kept[-1].item(),
        "kept_sum[0]": pytest.approx((kept.double().sum() / delta.double().sum()).item(), rel=1e-6),
        "kept[1]": 100 / N,
        "threshold[1]": 0.0,
        "kept_sum[1]": 1.0,
    }
    engine.run(find_op("dare_linear").kernel({"weight": (1.0, 1.0), "density": (0.2, 1.0)}))
    assert engine.figures[0] == {"kept_sum[0]": pytest.approx(0.2, abs=0.01)}
    engine.run(find_op("ties").kernel({"weight": (1.0, 1.0)}))
    assert engine.figures[0] == {}


@pytest.mark.parametrize("method", ["ties", "breadcrumbs_ties", "dare_ties", "task_arithmetic"])
def test_outputs_made_at_once_are_those_of_single_merges(method: str) -> None:
    """Thresholds in the same bins, and in several; models left out of some outputs, and kept whole in others."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(300_001, generator=generator)
    noise = [torch.randn(300_001, generator=generator) * 0.01 for _ in range(2)]
    sources = [base.bfloat16(), *((base + each).bfloat16() for each in noise)]
    op = find_op(method)
    has_density = any(parameter.name == "density" for parameter in op.parameters)
    kernels = [
        op.kernel({"weight": weights} | ({"density": densities} if has_density else {}))
        for densities in [(0.1, 0.1), (0.101, 0.5), (0.5, 1.0), (0.9, 0.3), (0.0, 0.7)]
        for weights in [(1.0, 1.0), (0.3, -0.2), (0.5, 0.0)]
    ]
    engine = LoopEngine(sources, "w")
    together = engine.run(kernels, torch.bfloat16, cuts=(5, 131_072, 200_000))
    figures, norms = engine.figures, engine.norms
    for number, (kernel, merged) in enumerate(zip(kernels, together, strict=True)):
        assert torch.equal(merged, engine.run([kernel], torch.bfloat16)[0]), kernel
        assert figures[number] == engine.figures[0]
        assert norms[number] == pytest.approx(engine.norms[0], rel=1e-12)


def test_outputs_that_differ_in_rules_are_those_of_single_merges() -> None:
    """An op of somebody's own may choose the rule by a parameter, which a sweep may vary."""
    generator = torch.Generator().manual_seed(0)
    sources = [torch.randn(200_001, generator=generator) for _ in range(3)]
    common: dict[str, Any] = {"weights": (0.7, 0.4), "densities": (0.3,), "normalize": True, "scale": 1.0}
    rules = [("magnitude", "none"), ("magnitude", "sum"), ("random", "sum"), ("none", "overlap"), ("magnitude", "sum")]
    kernels = [SparseDeltas(sparsifier=s, consensus=c, rescale="l1", **common) for s, c in rules]  # type: ignore[arg-type]
    for ordered in (kernels, kernels[::-1]):
        engine = LoopEngine(sources, "w")
        together, figures = engine.run(ordered, torch.float32), engine.figures
        for kernel, merged, found in zip(ordered, together, figures, strict=True):
            assert torch.equal(merged, engine.run([kernel], torch.float32)[0]), kernel
            assert found == engine.figures[0]
