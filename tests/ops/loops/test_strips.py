"""Decoding and rounding in compiled loops, for every stored value of 16 bits and floats of all kinds, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raymerge.ops.kernel import Site
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.stored import STRIP, Slot, Stored

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
NAN_BITS = {torch.bfloat16: 0x7FC0, torch.float16: 0x7E00, torch.float32: 0x7FC00000}
EDGES = (0x0, 0x1, 0x32FFFFFF, 0x33000000, 0x33000001, 0x33800000, 0x387FE000, 0x387FEFFF, 0x387FFFFF, 0x38800000)
LARGE_EDGES = (0x477FE000, 0x477FEFFF, 0x477FF000, 0x47800000, 0x7F7F7FFF, 0x7F7F8000, 0x7F800000, 0x7F800001)


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def convert(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the values as loops read them from their own dtype and round them to another."""
    content = bytearray(values.view(torch.uint8).numpy().tobytes())
    out = bytearray(len(values) * dtype.itemsize)
    run = LinearCombination((1.0,)).start(Site("", (len(values),), 1, 0))
    stored = Stored(0, len(values), memoryview(content), (0,), (name_of(values.dtype),))
    run.combine_stored(stored, Slot(memoryview(out), name_of(dtype), np.zeros(STRIP, np.float32)))
    return torch.frombuffer(out, dtype=dtype)


def bits_of(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.dtype.itemsize == 2 else torch.int32)


def make_values(dtype: torch.dtype) -> torch.Tensor:
    """Return all values of 16 bits; of floats, edges of both signs, random bits, and small ones."""
    if dtype.itemsize == 2:
        return torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor(EDGES + LARGE_EDGES, dtype=torch.int32)
    random = torch.randint(-(2**31), 2**31 - 1, (2**18,), generator=generator, dtype=torch.int32)
    small = (torch.randn(2**16, generator=generator) * 1e-5).view(torch.int32)
    return torch.cat([edges, edges | -(2**31), random, small]).view(torch.float32)


@pytest.mark.parametrize("to", DTYPES, ids=name_of)
@pytest.mark.parametrize("source", DTYPES, ids=name_of)
def test_rounds_as_torch_does(source: torch.dtype, to: torch.dtype) -> None:
    values = make_values(source)
    expected = bits_of(values.to(to)).clone()
    expected[values.isnan()] = NAN_BITS[to]
    assert torch.equal(bits_of(convert(values, to)), expected)
