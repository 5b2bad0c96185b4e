"""Integers made of those of all inputs."""

from __future__ import annotations

import pickle

import pytest
import torch

from raymerge.ops.errors import IntegerOverflowError
from raymerge.ops.kernels.integers import Accumulation
from tests.ops.engine import run_kernel

LARGE = 2**62


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint32, torch.uint8])
def test_every_element_of_all_blocks(dtype: torch.dtype) -> None:
    low = torch.iinfo(dtype).min // 4
    sources = [torch.randint(low, 40, (200_000,)).to(dtype) for _ in range(3)]
    wide = torch.stack([source.long() for source in sources])
    name = str(dtype).removeprefix("torch.")
    assert torch.equal(run_kernel(Accumulation(False, name), sources), wide.amax(0))
    assert torch.equal(run_kernel(Accumulation(True, name), sources), wide.sum(0))


def test_what_floats_cannot_hold() -> None:
    sources = [torch.tensor([2**53, -LARGE, LARGE]), torch.tensor([1, -LARGE, LARGE - 1])]
    assert run_kernel(Accumulation(True, "int64"), sources).tolist() == [2**53 + 1, -(2**63), 2**63 - 1]


def test_only_the_whole_sum_has_to_fit() -> None:
    sources = [torch.tensor([value], dtype=torch.int8) for value in (100, 100, -100)]
    assert run_kernel(Accumulation(True, "int8"), sources).tolist() == [100]


@pytest.mark.parametrize(
    ("dtype", "values"),
    [("int64", (LARGE, LARGE)), ("int64", (-LARGE, -LARGE - 1)), ("int8", (100, 28)), ("uint8", (255, 1))],
)
def test_sums_that_the_dtype_cannot_hold(dtype: str, values: tuple[int, int]) -> None:
    sources = [torch.tensor([1, value, 1], dtype=getattr(torch, dtype)) for value in values]
    with pytest.raises(IntegerOverflowError, match=f"the models' sum does not fit into {dtype}; write") as caught:
        run_kernel(Accumulation(True, dtype), sources)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
