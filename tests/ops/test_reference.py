"""Every op against its formula, written plainly for whole tensors in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from raymerge.ops.registry import find_op
from raymerge.ops.slerp import slerp_coefficients
from tests.ops.engine import run_kernel
from tests.ops.samples import make_fine_tunes
from tests.ops.test_select import keep_largest

N = 150_001
NAME = "model.layers.0.weight"
Tensors = list[torch.Tensor]
Reference = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
NO_DRAW = torch.zeros(N, dtype=torch.bool)


def random_mask(position: int, num_models: int, density: float) -> torch.Tensor:
    """Return which elements DARE keeps of one model: merge a delta of ones, all others being zero."""
    tensors = [torch.zeros(N) for _ in range(num_models + 1)]
    tensors[position + 1].fill_(1)
    parameters: dict[str, Any] = {"weight": (1.0,) * num_models, "density": (density,) * num_models, "rescale": False}
    mask = run_kernel(find_op("dare_linear").kernel(parameters), tensors, name=NAME)
    assert set(mask.tolist()) <= {0.0, 1.0}
    return mask.double()


def task_arithmetic(
    tensors: Tensors,
    sparsify: Callable[[torch.Tensor, int], torch.Tensor],
    weight: tuple[float, ...],
    *,
    consensus: bool,
    normalize: bool,
    rescale: bool,
    scale: float,
) -> Reference:
    """Return the merged tensor, the size of its terms, and where the election is a draw as far as float32 can tell."""
    base = tensors[0]
    votes = []
    for position, model in enumerate(tensors[1:]):
        delta = model - base
        kept = sparsify(delta, position)
        if rescale:
            kept = kept * (delta.abs().sum() / kept.abs().sum())
        votes.append(weight[position] * kept)
    total = torch.stack(votes).sum(0)
    if consensus:
        majority = torch.where(total >= 0, 1.0, -1.0)
        masks = [(vote.sign() == majority).double() for vote in votes]
        draw = total.abs() < 1e-6 * torch.stack(votes).abs().sum(0)
    else:
        masks = [torch.ones_like(vote) for vote in votes]
        draw = torch.zeros_like(total, dtype=torch.bool)
    mixed = torch.stack([vote * mask for vote, mask in zip(votes, masks, strict=True)]).sum(0)
    divisor = torch.stack([w * mask for w, mask in zip(weight, masks, strict=True)]).sum(0)
    divisor[divisor.abs() < 1e-8] = 1
    terms = torch.stack(votes).abs().sum(0)
    if normalize:
        mixed, terms = mixed / divisor, terms / divisor.abs()
    return base + scale * mixed, base.abs() + scale * terms, draw


def assert_rounded_once(merged: torch.Tensor, exact: torch.Tensor, terms: torch.Tensor) -> None:
    """Assert that bfloat16 values are the exact ones, to half an ulp and one part in 10^6 of the terms."""
    nearest = exact.to(torch.bfloat16)
    ulp = (nearest.abs().view(torch.int16) + 1).view(torch.bfloat16).double() - nearest.abs().double()
    error = (merged.double() - exact).abs()
    assert (error <= ulp / 2 + 1e-6 * terms).all(), (error / (ulp / 2)).max()


def check(op: str, parameters: dict[str, Any], tensors: Tensors, reference: Reference) -> None:
    kernel = find_op(op).kernel(parameters)
    exact, terms, draw = reference
    assert draw.double().mean() < 0.05
    float32 = run_kernel(kernel, tensors, name=NAME).double()
    assert ((float32 - exact).abs() <= 1e-6 * terms)[~draw].all()
    bfloat16 = run_kernel(kernel, tensors, name=NAME, out_dtype=torch.bfloat16)
    assert_rounded_once(bfloat16[~draw], exact[~draw], terms[~draw])


@pytest.fixture(params=[torch.bfloat16, torch.float16, torch.float32], ids=str)
def tensors(request: pytest.FixtureRequest) -> Tensors:
    return make_fine_tunes(N, 3, dtype=request.param, seed=7)


def widen(tensors: Tensors) -> Tensors:
    return [tensor.double() for tensor in tensors]


@pytest.mark.parametrize(("weight", "normalize"), [((0.5, 0.3, 0.4), True), ((1.0, -0.7, 0.2), False)])
def test_linear(tensors: Tensors, weight: tuple[float, ...], normalize: bool) -> None:
    models = tensors[1:]
    products = torch.stack([w * x for w, x in zip(weight, widen(models), strict=True)])
    products /= sum(weight) if normalize else 1
    reference = products.sum(0), products.abs().sum(0), NO_DRAW
    check("linear", {"weight": weight, "normalize": normalize}, models, reference)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_slerp(tensors: Tensors, t: float, noise: float) -> None:
    a, b = tensors[:2]
    b = (b + noise * torch.randn(N, generator=torch.Generator().manual_seed(3))).to(b.dtype)
    x, y = widen([a, b])
    cosine = (x @ y / (x.norm() * y.norm())).item()
    assert noise == 0 or cosine < 0.9
    if cosine > 0.9995:
        x, y = (1 - t) * x, t * y
    else:
        angle = math.acos(cosine)
        x, y = x * math.sin((1 - t) * angle) / math.sin(angle), y * math.sin(t * angle) / math.sin(angle)
    check("slerp", {"t": t}, [a, b], (x + y, x.abs() + y.abs(), NO_DRAW))


def test_slerp_of_special_vectors() -> None:
    v = torch.randn(1000)
    slerp = find_op("slerp").kernel({"t": 0.5})
    torch.testing.assert_close(run_kernel(slerp, [torch.zeros(1000), v]), v * math.sqrt(0.5))
    torch.testing.assert_close(run_kernel(slerp, [v, torch.zeros(1000)]), v * math.sqrt(0.5))
    assert torch.equal(run_kernel(slerp, [v, -v]), torch.zeros(1000))
    assert slerp_coefficients(0.25, 4.0, 9.0, -6.0) == (0.75, 0.25)
    assert slerp_coefficients(0.25, 1e-18, 1e-18, 1e-18) == slerp_coefficients(0.25, 1.0, 1.0, 1e-18)


@pytest.mark.parametrize("weight", [(0.5, 0.3, 0.4), (1.0, 1.0, 1.0), (0.5, -0.25, 0.75)])
@pytest.mark.parametrize("normalize", [False, True])
def test_task_arithmetic(tensors: Tensors, weight: tuple[float, ...], normalize: bool) -> None:
    expected = task_arithmetic(
        widen(tensors),
        lambda delta, _: delta,
        weight,
        consensus=False,
        normalize=normalize,
        rescale=False,
        scale=0.7,
    )
    parameters = {"weight": weight, "normalize": normalize, "lambda": 0.7, "density": (0.1, 0.1, 0.1)}
    check("task_arithmetic", parameters, tensors, expected)


SETTINGS = [
    {"weight": (1.0, 1.0, 1.0), "density": (0.5, 0.5, 0.5), "normalize": True, "rescale": False, "lambda": 1.0},
    {"weight": (0.3, 0.3, 0.3), "density": (0.5, 0.2, 1.0), "normalize": True, "rescale": True, "lambda": 0.5},
    {"weight": (0.5, 0.3, 0.4), "density": (0.5, 0.7, 0.01), "normalize": False, "rescale": True, "lambda": 1.0},
    {"weight": (0.5, 0.25, -0.5), "density": (0.5, 0.5, 1.5), "normalize": True, "rescale": False, "lambda": 1.3},
    {"weight": (0.3, 0.3, 0.3), "density": (0.9, 0.5, 0.5), "normalize": False, "rescale": False, "lambda": 1.0},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_ties(tensors: Tensors, settings: dict[str, Any]) -> None:
    deltas = [(x.float() - tensors[0].float()) for x in tensors[1:]]

    def sparsify(delta: torch.Tensor, position: int) -> torch.Tensor:
        num_kept = int(settings["density"][position] * N)
        return delta * keep_largest(deltas[position], num_kept).bool()

    expected = reference(tensors, sparsify, settings, consensus=True)
    check("ties", settings, tensors, expected)


@pytest.mark.parametrize("op", ["dare_linear", "dare_ties"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_dare(tensors: Tensors, op: str, settings: dict[str, Any]) -> None:
    def sparsify(delta: torch.Tensor, position: int) -> torch.Tensor:
        return delta * random_mask(position, 3, settings["density"][position])

    expected = reference(tensors, sparsify, settings, consensus=op == "dare_ties")
    check(op, settings, tensors, expected)


def reference(
    tensors: Tensors,
    sparsify: Callable[[torch.Tensor, int], torch.Tensor],
    settings: dict[str, Any],
    *,
    consensus: bool,
) -> Reference:
    """Return what `task_arithmetic` does, with the words of the YAML."""
    return task_arithmetic(
        widen(tensors),
        sparsify,
        settings["weight"],
        consensus=consensus,
        normalize=settings["normalize"],
        rescale=settings["rescale"],
        scale=settings["lambda"],
    )


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
