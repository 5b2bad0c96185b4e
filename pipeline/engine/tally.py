"""Figures of the tensors that have been written to one shard."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

_LARGEST_FLOAT16, _LARGEST_FLOAT32 = 65504.0, 3.4028234663852886e38


class Tally:
    """Norms of the tensors of a shard, and the names of those with NaN or infinity."""

    def __init__(self) -> None:
        self._squares: dict[str, float] = {}
        self._nonfinite: dict[str, None] = {}

    @property
    def nonfinite(self) -> tuple[str, ...]:
        """Tensors with NaN or infinity among what was written."""
        return tuple(self._nonfinite)

    def add(self, name: str, squares: float, dtype: str, look: Callable[[], tuple[float, bool]]) -> None:
        """Note some values of a tensor.

        Args:
            name: of the tensor.
            squares: the sum of their squares, in float32: overflow is told from infinity by looking at the values.
            dtype: what they are rounded to in the file, by torch's word for it.
            look: returns the sum of the squares of the rounded values in float64, and whether all of them are finite.
        """
        if not is_harmless(squares, dtype):
            squares, is_finite = look()
            if not is_finite:
                self._nonfinite[name] = None
        self._squares[name] = self._squares.get(name, 0.0) + squares

    def figures(self) -> Mapping[str, Mapping[str, float]]:
        """Return the norm of each tensor, right to about five digits."""
        return {name: {"norm": math.sqrt(total)} for name, total in self._squares.items()}


def is_harmless(squares: float, dtype: str) -> bool:
    """Return whether a sum of squares says that no value overflows in a dtype, nor its square in float32."""
    return squares < (_LARGEST_FLOAT16 * _LARGEST_FLOAT16 if dtype == "float16" else _LARGEST_FLOAT32)
