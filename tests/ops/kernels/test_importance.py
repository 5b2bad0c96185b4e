"""Arcee Fusion by rows, and the divergence that decides it; tests/ops/test_kernel.py compares it with its formula."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.kernels.divergence import measure_divergence, write_exponentials, write_logarithms
from raymerge.ops.registry import find_op
from tests.ops.engine import NAME, Engine, run_kernel
from tests.ops.kernel_contract import assert_close
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

KERNEL = find_op("arcee_fusion").kernel({})


@pytest.mark.parametrize("shape", [(300, 1001), (7, 70_003), (2, 5, 31, 999), (100_000, 3), (200_000, 1)])
def test_works_on_rows(shape: tuple[int, ...]) -> None:
    """Cut anywhere between blocks of whole rows, to the same bits."""
    site = Site(NAME, shape, 2, 0)
    grid = KERNEL.grid(site)
    assert grid % shape[-1] == 0
    assert grid <= BLOCK_ELEMENTS
    sources = [x.reshape(shape) for x in make_fine_tunes(site.num_elements, 1, dtype=torch.float32)]
    num_blocks = -(-site.num_elements // grid)
    engine = Engine(sources)
    merged = engine.run(KERNEL)[0]
    exact = find_exact("arcee_fusion", sources, {})
    assert exact.is_draw.double().mean() < 1e-3 or shape[-1] == 1
    assert_close(merged, exact)
    for cuts in ([num_blocks], [1, num_blocks], [num_blocks - 1, num_blocks]):
        other = Engine(sources, cuts=cuts)
        assert torch.equal(other.run(KERNEL)[0], merged)
        assert other.figures == engine.figures


def test_a_row_longer_than_a_block_is_a_block() -> None:
    assert KERNEL.grid(Site(NAME, (3, 2 * BLOCK_ELEMENTS + 1), 2, 0)) == 2 * BLOCK_ELEMENTS + 1
    assert KERNEL.grid(Site(NAME, (), 2, 0)) == BLOCK_ELEMENTS


def test_takes_values_of_either_model_as_they_are() -> None:
    base, model = (x.reshape(300, 500) for x in make_fine_tunes(150_000, 1))
    merged = run_kernel(KERNEL, [base, model])
    taken = merged == model.double()
    assert (taken | (merged == base.double())).all()
    assert 0.01 < (taken & (model != base)).double().mean() < 0.2


def test_exponentials_and_logarithms_are_right() -> None:
    x = torch.linspace(-60, 0, 100_003, dtype=torch.float64)
    found = write_exponentials(x.clone(), torch.empty_like(x))
    for lowest, error in ((-10, 1e-11), (-20, 1e-10), (-48, 1e-7)):
        torch.testing.assert_close(found[x >= lowest], x[x >= lowest].exp(), rtol=error, atol=0)
    assert found.min() > 0
    ratios = torch.logspace(-8, 8, 100_003, dtype=torch.float64)
    ratios[:1000] = torch.linspace(1 - 1e-6, 1 + 1e-6, 1000, dtype=torch.float64)
    logarithms = write_logarithms(ratios.clone(), [torch.empty_like(x) for _ in range(3)])
    torch.testing.assert_close(logarithms, ratios.log(), rtol=1e-15, atol=1e-15)


@pytest.mark.parametrize("deviation", [1e-3, 0.1, 30.0])
def test_the_divergence_is_that_of_the_softmax(deviation: float) -> None:
    random = torch.Generator().manual_seed(3)
    p, q = (torch.randn(50, 777, dtype=torch.float64, generator=random) * 0.02 for _ in range(2))
    q.mul_(deviation).add_(p)
    shares, others = (x.softmax(1) + 1e-8 for x in (p, q))
    expected = (shares * (shares / others).log()).sum(1)
    spares = [torch.empty_like(p) for _ in range(3)]
    found = measure_divergence(p.clone(), q, spares)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=2e-15)
    assert not measure_divergence(p.clone(), p, spares).any()
