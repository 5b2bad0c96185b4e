"""Which weights can be normalized, and several outputs of one reading."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.registry import find_op
from tests.ops.engine import run_kernel
from tests.ops.loop_engine import LoopEngine


@pytest.mark.parametrize("weight", [(0.5, -0.5), (0.0, 0.0), (0.1, 0.2, -0.3), (1e20, 2e20, -3e20, 1e3)])
def test_refuses_to_normalize_weights_that_cancel(weight: tuple[float, ...]) -> None:
    with pytest.raises(OpParameterError, match=r"sum to .*, so they cannot be normalized"):
        find_op("linear").kernel({"weight": weight})


@pytest.mark.parametrize(
    ("weight", "normalize", "expected"),
    [((1e-12, 2e-12), True, 7 / 3), ((1.0, -0.999), True, -1996.0), ((0.5, -0.5), False, -1.0)],
)
def test_takes_any_other_weights(weight: tuple[float, ...], normalize: bool, expected: float) -> None:
    kernel = find_op("linear").kernel({"weight": weight, "normalize": normalize})
    merged = run_kernel(kernel, [torch.tensor([1.0]), torch.tensor([3.0])])
    assert merged.item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("num_sources", [1, 2, 3, 4, 5, 11])
def test_outputs_made_at_once_are_those_of_single_merges(num_sources: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(num_sources)
    sources = [torch.randn(300_001, generator=generator).to(dtype) for _ in range(num_sources)]
    weights = [torch.rand(num_sources, generator=generator).tolist() for _ in range(5)]
    linear = find_op("linear")
    kernels = [linear.kernel({"weight": tuple(each), "normalize": k % 2 == 0}) for k, each in enumerate(weights)]
    engine = LoopEngine(sources, "w")
    together = engine.run(kernels, dtype, cuts=(5, 131_072, 200_000))
    norms = engine.norms
    for kernel, merged, norm in zip(kernels, together, norms, strict=True):
        assert torch.equal(merged, engine.run([kernel], dtype)[0])
        assert norm == engine.norms[0]
        assert torch.equal(merged, run_kernel(kernel, [source.float() for source in sources]).to(dtype))
