"""Copies of what all inputs have in common."""

from __future__ import annotations

import pickle

import pytest
import torch

from raymerge.ops.errors import SourceMismatchError
from raymerge.ops.kernels.copy import Identical
from tests.ops.engine import run_kernel


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.uint8)


def test_copies_bit_for_bit() -> None:
    values = torch.arange(200_000)
    values[5] = -1
    merged = run_kernel(Identical(), [as_bytes(values), as_bytes(values.clone())])
    assert torch.equal(merged, as_bytes(values))
    nan = as_bytes(torch.tensor([torch.nan, -torch.nan, 0.0, -0.0]))
    assert torch.equal(run_kernel(Identical(), [nan]), nan)


@pytest.mark.parametrize("place", [0, 1_599_999])
@pytest.mark.parametrize("source", [1, 2])
def test_names_the_source_that_differs(source: int, place: int) -> None:
    sources = [as_bytes(torch.arange(200_000)) for _ in range(3)]
    sources[source][place] ^= 128
    with pytest.raises(SourceMismatchError, match=f"source {source} ") as caught:
        run_kernel(Identical(), sources)
    again = pickle.loads(pickle.dumps(caught.value))
    assert (type(again), again.source, str(again)) == (SourceMismatchError, source, str(caught.value))
