"""Masks by the ranks within rows, and what masks of random methods have in common."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Site
from raymerge.ops.kernels.sparsifiers import ranks
from raymerge.ops.registry import find_op
from tests.ops.engine import NAME, run_kernel
from tests.ops.kernel_contract import assert_close
from tests.ops.loop_engine import LoopEngine
from tests.ops.samples import make_fine_tunes
from tests.references import find_chances, find_exact

SHAPE = (128, 4096)
RANDOM = ["dare_linear", "dare_ties", "della", "della_linear"]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def thin(op: str, deltas: list[torch.Tensor], density: float, **settings: Any) -> torch.Tensor:
    """Return the sum of thinned deltas."""
    parameters: dict[str, Any] = {
        "weight": (1.0,) * len(deltas),
        "density": (density,) * len(deltas),
        "normalize": False,
    } | settings
    return run_kernel(find_op(op).kernel(parameters), [torch.zeros_like(deltas[0]), *deltas])


def list_chances(op: str, delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    if op.startswith("dare"):
        return torch.full_like(delta, density).double()
    return find_chances(delta, density, epsilon)


@pytest.mark.parametrize("shape", [(40, 75), (3, 20, 50), (1000,), (200, 1), (2, 140_000), (1, 1), ()], ids=str)
@pytest.mark.parametrize("mode", ["l1", "inverse_density"])
def test_rows_lie_along_the_last_dimension(shape: tuple[int, ...], mode: str) -> None:
    tensors = [noise(*shape, seed=seed) for seed in range(3)]
    parameters: dict[str, Any] = {
        "weight": (1.0, 0.5),
        "density": (0.5, 0.3),
        "epsilon": (0.15, 0.29),
        "rescale_mode": mode,
    }
    for op in ("della", "della_linear"):
        exact = find_exact(op, [tensor.reshape(shape or (1,)) for tensor in tensors], parameters, name=NAME, seed=5)
        merged = run_kernel(find_op(op).kernel(parameters), tensors, seed=5)
        assert_close(merged.reshape(shape or (1,)), exact)


def test_rows_of_one_element_are_kept_as_often_as_the_density_says() -> None:
    kept = (thin("della_linear", [noise(100_000, 1)], 0.3, epsilon=(0.2,)) != 0).double()
    assert abs(kept.mean() - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 100_000)


@pytest.mark.parametrize("kept_nbytes", [0, 2**15])
def test_masks_that_are_not_kept_are_drawn_again(kept_nbytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever rows are cut when they are combined."""
    tensors = [tensor.reshape(210, 1500) for tensor in make_fine_tunes(315_000, 2)]
    kernel = find_op("della").kernel({"weight": (1.0, 0.5), "density": (0.5, 0.4)})
    (kept,) = LoopEngine(tensors, NAME).run([kernel], torch.bfloat16)
    monkeypatch.setattr(ranks, "_KEPT_NBYTES", kept_nbytes)
    for is_forked in (False, True):
        (drawn,) = LoopEngine(tensors, NAME).run([kernel], torch.bfloat16, cuts=(777, 200_001), is_forked=is_forked)
        assert torch.equal(drawn, kept)


def test_equal_sizes_are_kept_equally_often() -> None:
    """Those of one row that share exponent and 6 binary places, whatever their signs and places: their mean rank's."""
    sizes = torch.tensor([1.0, 1.01, 2.0, 1.0, 3.0, 3.01, 1.0, 3.0, 0.5, 1.015])
    ranks = torch.tensor([3.0, 3, 6, 3, 8, 8, 3, 8, 0, 3])
    delta = sizes.repeat(20_000, 1)
    delta[:, ::2] *= -1
    rates = (thin("della_linear", [delta], 0.5, epsilon=(0.4,)) != 0).double().mean(0)
    expected = 0.1 + 0.8 * ranks.double() / 9
    assert ((rates - expected).abs() < 4 * (expected * (1 - expected) / 20_000).sqrt()).all()


@pytest.mark.parametrize("op", RANDOM)
@pytest.mark.parametrize("density", [0.2, 0.5, 0.8])
class TestRandomMethods:
    """Within four standard errors."""

    def test_keep_rate_and_signs(self, op: str, density: float) -> None:
        delta = noise(*SHAPE)
        chances = list_chances(op, delta, density, 0.15)
        kept = (thin(op, [delta], density, rescale=False) != 0).double()
        deviation = float((chances * (1 - chances)).sum().sqrt())
        assert abs(float((kept - chances).sum())) < 4 * deviation
        assert abs(float((delta.sign() * (kept - chances)).sum())) < 4 * deviation
        large = delta.abs() > delta.abs().median()
        assert abs(float((kept - chances)[large].sum())) < 4 * deviation

    def test_l1_rescaling_keeps_the_sum_of_absolute_values(self, op: str, density: float) -> None:
        delta = noise(*SHAPE)
        assert float(thin(op, [delta], density).abs().double().sum()) == pytest.approx(
            float(delta.abs().double().sum()), rel=1e-6
        )

    def test_inverse_density_is_unbiased(self, op: str, density: float) -> None:
        delta = noise(*SHAPE).double()
        chances = list_chances(op, delta, density, 0.15)
        thinned = thin(op, [delta.float()], density, rescale_mode="inverse_density").double()
        deviation = float((delta.square() * (1 - chances) / chances).sum().sqrt())
        assert abs(float((thinned - delta).sum())) < 4 * deviation
        assert abs(float((thinned.abs() - delta.abs()).sum())) < 4 * deviation
        is_kept = thinned != 0
        torch.testing.assert_close(thinned[is_kept], (delta / chances)[is_kept], rtol=1e-6, atol=0)


@pytest.mark.parametrize("op", ["dare_linear", "della_linear"])
def test_masks_of_two_models_are_independent(op: str) -> None:
    deltas = [noise(*SHAPE), noise(*SHAPE, seed=1)]
    alone = [thin(op, deltas, 0.5, rescale=False, weight=weights) for weights in [(1.0, 0.0), (0.0, 1.0)]]
    residues = [
        (kept != 0).double() - list_chances(op, delta, 0.5, 0.15) for kept, delta in zip(alone, deltas, strict=True)
    ]
    covariance = float((residues[0] * residues[1]).sum())
    assert abs(covariance) < 4 * math.sqrt(float((residues[0].square() * residues[1].square()).sum()))


def test_the_inverse_density_of_dare_is_not_measured() -> None:
    kernel = find_op("dare_ties").kernel({"weight": (1.0,), "density": (0.5,), "rescale_mode": "inverse_density"})
    assert kernel.num_passes(site := Site(NAME, SHAPE, 2, 0)) == kernel.state_nbytes(site) == 0


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.15, 0.15), (0.5, 0.5), (0.5, -0.6)])
def test_refuses_probabilities_that_are_none(density: float, epsilon: float) -> None:
    with pytest.raises(OpParameterError, match=f"density {density} and epsilon {epsilon} give probabilities from"):
        find_op("della").kernel({"weight": (1.0,), "density": (density,), "epsilon": (epsilon,)})


def test_tells_the_range_that_is_allowed() -> None:
    with pytest.raises(OpParameterError, match=r"density lies between 0\.15 and 0\.85 .* epsilon is less than 0\.1$"):
        find_op("della_linear").kernel({"weight": (1.0, 1.0), "density": (1.0, 0.9), "epsilon": (0.15, 0.15)})


@pytest.mark.parametrize("density", [1.0, 1.5, 0.0, -0.5])
def test_all_or_nothing_needs_no_range(density: float) -> None:
    delta = noise(10, 20)
    kept = thin("della", [delta], density, epsilon=(0.9,))
    assert torch.equal(kept, delta if density >= 1 else torch.zeros_like(delta))
