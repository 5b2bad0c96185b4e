"""Names of dtypes: safetensors headers say BF16, torch and the YAML say bfloat16."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class DType:
    """A dtype of the safetensors format."""

    name: str
    """As in a safetensors header."""
    num_bits: int
    torch_name: str
    """Attribute of the torch module, and the word used in config.json; empty where torch has none."""
    is_mergeable: bool
    """A floating-point dtype that holds values as they are, not quantised ones that need a scale."""

    @property
    def is_within_int64(self) -> bool:
        """Whether these are integers that int64 can hold, all of them."""
        return self.name[0] in "IU" and self.name != "U64"


_ALL = (
    DType("F64", 64, "float64", True),
    DType("F32", 32, "float32", True),
    DType("F16", 16, "float16", True),
    DType("BF16", 16, "bfloat16", True),
    DType("I64", 64, "int64", False),
    DType("I32", 32, "int32", False),
    DType("I16", 16, "int16", False),
    DType("I8", 8, "int8", False),
    DType("U64", 64, "uint64", False),
    DType("U32", 32, "uint32", False),
    DType("U16", 16, "uint16", False),
    DType("U8", 8, "uint8", False),
    DType("BOOL", 8, "bool", False),
    DType("C64", 64, "complex64", False),
    DType("F8_E4M3", 8, "float8_e4m3fn", False),
    DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz", False),
    DType("F8_E5M2", 8, "float8_e5m2", False),
    DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz", False),
    DType("F8_E8M0", 8, "float8_e8m0fnu", False),
    DType("F6_E2M3", 6, "", False),
    DType("F6_E3M2", 6, "", False),
    DType("F4", 4, "", False),
)

DTYPES = {dtype.name: dtype for dtype in _ALL}
"""By the name in a safetensors header."""

OUTPUT_DTYPES = {dtype.torch_name: dtype.name for dtype in _ALL if dtype.is_mergeable}
"""The dtypes that a merge can be written in, with the name of each in a header."""

_SHORT = {
    "float64": ("double", "fp64", "f64"),
    "float32": ("float", "single", "fp32", "f32"),
    "float16": ("half", "fp16", "f16"),
    "bfloat16": ("bf16",),
}
DTYPE_NAMES = {
    name: header
    for torch_name, header in OUTPUT_DTYPES.items()
    for short in (torch_name, *_SHORT[torch_name])
    for name in (short, short.upper())
}
"""Names of dtypes in configs, with the name of each in a header."""


def count_nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size in bytes of a tensor of a shape and a dtype, as a safetensors header names it.

    >>> count_nbytes((2, 3), "BF16")
    12
    """
    return math.prod(shape) * DTYPES[dtype].num_bits // 8
