"""Columns made by their buffers, against those that pyarrow makes of the same values."""

from __future__ import annotations

import pyarrow as pa
import pytest

from raymerge.pipeline.checkpoint import columns
from raymerge.pipeline.checkpoint.columns import (
    make_coded,
    make_lists,
    make_numbers,
    make_texts,
    read_numbers,
    read_texts,
)

TEXTS = ["embed", "", "é日😀", "embed", "x" * 300]
LISTS = pa.list_(pa.field("item", pa.int64(), nullable=False))


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (make_numbers([1, -(2**63), 2**63 - 1], pa.int64()), pa.array([1, -(2**63), 2**63 - 1], pa.int64())),
        (make_numbers([0.1, None, 3.0] * 7, pa.float32()), pa.array([0.1, None, 3.0] * 7, pa.float32())),
        (make_numbers([1e300, -1e300], pa.float32()), pa.array([1e300, -1e300], pa.float32())),
        (make_numbers([None], pa.float32()), pa.array([None], pa.float32())),
        (make_numbers([], pa.float32()), pa.array([], pa.float32())),
        (make_texts(TEXTS), pa.array(TEXTS, pa.string())),
        (make_texts([]), pa.array([], pa.string())),
        (make_coded(TEXTS), pa.array(TEXTS, pa.dictionary(pa.int32(), pa.string()))),
        (make_lists([(2, 3), (), (4,)], LISTS), pa.array([[2, 3], [], [4]], LISTS)),
        (make_lists([], LISTS), pa.array([], LISTS)),
    ],
)
def test_columns_are_those_of_pyarrow(made: pa.Array, expected: pa.Array) -> None:
    made.validate(full=True)
    assert (made.type, made.null_count) == (expected.type, expected.null_count)
    assert made.equals(expected)


def test_columns_are_read_from_any_row() -> None:
    assert read_numbers(make_numbers(range(10), pa.int32())[3:5]).tolist() == [3, 4]
    assert read_numbers(make_numbers([], pa.int64())).tolist() == []
    assert read_texts(make_coded(TEXTS)[1:]) == read_texts(make_texts(TEXTS)[1:]) == TEXTS[1:]


def test_values_that_no_column_holds_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OverflowError):
        make_numbers([2**63], pa.int64())
    monkeypatch.setattr(columns, "_MAX_OFFSET", 9)
    assert len(make_texts(["12345", "6789"])) == 2
    with pytest.raises(OverflowError, match="10 bytes or numbers in one column"):
        make_texts(["12345", "67890"])
