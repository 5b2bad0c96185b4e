"""Every op on another device than the CPU, which here is the CPU in disguise: a whole tensor at once, the same bits."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.registry import Op, load_ops
from raymerge.ops.sums import add_blocks
from tests.fake_gpu import DEVICE, FakeGpu, send
from tests.ops.engine import MemoryBlock, run_kernel
from tests.ops.samples import make_kernel, make_sources

CASES = [
    pytest.param(op, {name: not default}, id=f"{op.name}-{name}")
    for op in load_ops().values()
    for name, default in [("", None), *((p.name, p.default) for p in op.parameters if p.type is bool)]
]


@pytest.mark.parametrize(("op", "change"), CASES)
def test_every_op(op: Op, change: dict[str, bool]) -> None:
    change.pop("", None)
    kernel = make_kernel(op, **change)
    num_elements = 2 * BLOCK_ELEMENTS + 20_001
    sources = make_sources(op, num_elements)
    site = Site("model.layers.0.weight", (num_elements,), len(sources), 0)
    with FakeGpu():
        scratch = [torch.full((num_elements,), torch.nan, device=DEVICE) for _ in range(kernel.num_scratch(site))]
        block = MemoryBlock(0, num_elements, scratch, [send(source) for source in sources])
        run = kernel.start(site)
        for index in range(kernel.num_passes(site)):
            run.measure(index, block)
            run.end_pass(index)
        out = torch.full((num_elements,), torch.nan, device=DEVICE)
        run.combine(block, out)
        merged = out.cpu()
    assert torch.equal(merged, run_kernel(kernel, sources))


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
