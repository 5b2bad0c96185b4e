"""Which weights can be normalized."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.errors import OpParameterError
from raymerge.ops.registry import find_op
from tests.ops.engine import run_kernel


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
