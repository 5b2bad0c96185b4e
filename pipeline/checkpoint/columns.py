"""Columns of Arrow tables, made and read by their buffers.

`pyarrow.array` and `to_numpy` import pandas wherever that is installed, which takes as long as everything else that
planning imports.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:
    from numpy.typing import NDArray


_MAX_OFFSET = 2**31 - 1
"""Largest total of the texts or lists of one column, in bytes or numbers."""


def make_numbers(values: Sequence[float | None], kind: pa.DataType) -> pa.Array:
    """Return a column of numbers, or of none, of a fixed width.

    >>> make_numbers([1, None], pa.float32()).to_pylist()
    [1.0, None]
    """
    with np.errstate(over="ignore"):  # what is beyond the width is infinite, as pyarrow has it
        numbers = np.array([0 if value is None else value for value in values], kind.to_pandas_dtype())
    return pa.Array.from_buffers(kind, len(values), [_make_validity(values), pa.py_buffer(numbers)])


def make_texts(values: Sequence[str | None]) -> pa.Array:
    """Return a column of texts, or of none.

    >>> make_texts(["a", "", None, "é"]).to_pylist()
    ['a', '', None, 'é']
    """
    encoded = [(value or "").encode() for value in values]
    offsets = pa.py_buffer(_add_up(map(len, encoded)))
    return pa.Array.from_buffers(
        pa.string(), len(values), [_make_validity(values), offsets, pa.py_buffer(b"".join(encoded))]
    )


def make_coded(values: Sequence[str]) -> pa.Array:
    """Return a column of texts of which each is held once.

    >>> make_coded(["b", "a", "b"]).indices.to_pylist()
    [0, 1, 0]
    """
    codes: dict[str, int] = {}
    numbers = [codes.setdefault(value, len(codes)) for value in values]
    return pa.DictionaryArray.from_arrays(make_numbers(numbers, pa.int32()), make_texts(list(codes)))


def make_lists(values: Sequence[Sequence[int]], kind: pa.DataType) -> pa.Array:
    """Return a column of lists of numbers.

    >>> make_lists([(2, 3), ()], pa.list_(pa.int64())).to_pylist()
    [[2, 3], []]
    """
    items = make_numbers([item for value in values for item in value], kind.value_type)
    return pa.Array.from_buffers(kind, len(values), [None, pa.py_buffer(_add_up(map(len, values)))], children=[items])


def read_numbers(column: pa.Array) -> NDArray[Any]:
    """Return a column of numbers, of which all are there, without a copy.

    >>> read_numbers(make_numbers([1, 2, 3], pa.int64())[1:]).tolist()
    [2, 3]
    """
    numbers = np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype())
    return numbers[column.offset : column.offset + len(column)]


def read_texts(column: pa.Array) -> list[str]:
    """Return a column of texts; coded ones are held once each."""
    if not isinstance(column, pa.DictionaryArray):
        texts: list[str] = column.to_pylist()
        return texts
    dictionary = column.dictionary.to_pylist()
    return [dictionary[code] for code in read_numbers(column.indices).tolist()]


def _make_validity(values: Sequence[object]) -> pa.Buffer | None:
    """Return a bit for each value, whether there is one; None where all are there."""
    is_there = np.array([value is not None for value in values], bool)
    return None if is_there.all() else pa.py_buffer(np.packbits(is_there, bitorder="little"))


def _add_up(lengths: Iterable[int]) -> NDArray[np.int32]:
    """Return where each of some pieces begins, and where the last one stops.

    Raises:
        OverflowError: that is too far for a column of Arrow.
    """
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    if offsets[-1] > _MAX_OFFSET:
        raise OverflowError(f"{offsets[-1]:,} bytes or numbers in one column")
    return offsets.astype(np.int32)
