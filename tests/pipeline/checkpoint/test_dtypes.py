"""The table of dtypes is that of the safetensors library."""

from __future__ import annotations

import json
import re

import pytest
import safetensors
import safetensors.torch
import torch

from raymerge.pipeline.checkpoint.dtypes import DTYPES, DType
from raymerge.pipeline.checkpoint.header import parse_header
from raymerge.pipeline.stores.files import StoredFile


def load_with_library(dtype: str, num_data: int) -> None:
    """Have the library read a file with one tensor of 8 elements, in so many bytes."""
    header = json.dumps({"a": {"dtype": dtype, "shape": [8], "data_offsets": [0, num_data]}}).encode()
    safetensors.deserialize(len(header).to_bytes(8, "little") + header + bytes(num_data))  # type: ignore[no-untyped-call]


def test_names() -> None:
    with pytest.raises(safetensors.SafetensorError, match="unknown variant `F9`") as caught:
        load_with_library("F9", 8)
    assert set(re.findall("`(.*?)`", str(caught.value).partition("expected")[2])) == DTYPES.keys()


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=lambda dtype: dtype.name)
def test_sizes(dtype: DType) -> None:
    load_with_library(dtype.name, dtype.num_bits)
    for num_data in (dtype.num_bits - 1, dtype.num_bits + 1):
        with pytest.raises(safetensors.SafetensorError, match="invalid shape, data type, or offset"):
            load_with_library(dtype.name, num_data)


@pytest.mark.parametrize("dtype", [each for each in DTYPES.values() if each.torch_name], ids=lambda dtype: dtype.name)
def test_what_torch_calls_them(dtype: DType) -> None:
    data = safetensors.torch.save({"a": torch.zeros(8, dtype=getattr(torch, dtype.torch_name))})
    (entry,) = parse_header(data, StoredFile("x.safetensors", len(data), ""))
    assert (entry.dtype, entry.shape) == (dtype.name, (8,))
