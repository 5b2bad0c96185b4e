"""Sums over blocks: the same on every device, and right."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.sums import add_blocks
from tests.fake_gpu import FakeGpu, send


@pytest.mark.parametrize(
    "num_elements",
    [0, 1, 2**14 - 1, 2**14, 2**14 + 65, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, 3 * BLOCK_ELEMENTS + 20_001],
)
def test_sums(num_elements: int) -> None:
    x = torch.randn(num_elements, generator=torch.Generator().manual_seed(0)).pow_(3)
    total = 1.5
    for start in range(0, num_elements, BLOCK_ELEMENTS):
        total = add_blocks(total, x[start : start + BLOCK_ELEMENTS])
    assert add_blocks(1.5, x) == total
    with FakeGpu():
        assert add_blocks(1.5, send(x)) == total
    assert total == pytest.approx(1.5 + x.sum(dtype=torch.float64).item(), rel=1e-6, abs=1e-3)
