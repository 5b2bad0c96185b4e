"""Values as they are stored: the bits that torch rounds to, and the numbers that it reads."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.values import decode, encode


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_are_rounded_as_by_torch(dtype: str) -> None:
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, -1 - 2**-11, 0.0, -0.0, 65504.0, 1e-7, np.inf], np.float32)
    values = np.concatenate([ties, np.random.default_rng(0).standard_normal(1000, np.float32)])
    rounded = torch.from_numpy(values).to(getattr(torch, DTYPES[dtype].torch_name))
    content = encode(values, dtype)
    assert content == rounded.view(torch.uint8).numpy().tobytes()
    np.testing.assert_array_equal(decode(content, dtype), rounded.double().numpy())
