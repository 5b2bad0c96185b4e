from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.ops.kernels.sparsifiers import counts
from raymerge.ops.kernels.sparsifiers.counts import NUM_LOW, LowCounts, find_bin, read_table, take_table
from raymerge.ops.stored import Stored


@given(st.lists(st.integers(0, 1023), min_size=1, max_size=50), st.data())
def test_the_bin_of_a_rank(values: list[int], data: st.DataObject) -> None:
    rank = data.draw(st.integers(1, len(values)))
    table = np.bincount(values, minlength=1024)
    expected = sorted(values, reverse=True)[rank - 1]
    found = find_bin(table, rank)
    assert found == (expected, sum(value > expected for value in values), values.count(expected))


def test_low_bits_are_counted_for_each_bin_once() -> None:
    values = np.concatenate([np.zeros(3, np.float32), np.array([1, 1, 1.0000001, -2, 2.5], np.float32)])
    stored = Stored(0, 4, memoryview(bytearray(values[[0, 1, 2, 2, *range(3, 7)]])), (0, 16), ("float32",) * 2)
    low = LowCounts([0x3F80, 0x3F80, 0x4000], 1)
    low.count(stored, 1)
    low.count(stored, 1)
    assert {int(k): int(low.read(0x3F80)[k]) for k in np.flatnonzero(low.read(0x3F80))} == {0: 4, 1: 2}
    assert {int(k): int(low.read(0x4000)[k]) for k in np.flatnonzero(low.read(0x4000))} == {0: 2}
    low.leave()


def test_tables_are_used_again_and_few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(counts, "_TABLES", defaultdict(list))
    table = take_table(1)
    table[7] = 5
    assert read_table(table)[7] == 5
    again = take_table(1)
    assert again is table or again.base is table
    assert not again.any()
    for tables in ([take_table(num_rows) for _ in range(6)] for num_rows in range(1, 12)):
        for each in tables:
            read_table(each)
    kept = counts._TABLES
    assert max(len(tables) for tables in kept.values()) == 4
    assert 2**23 < sum(8 * size * len(tables) for size, tables in kept.items()) <= 2**24
    assert len(kept[NUM_LOW]) == 4
