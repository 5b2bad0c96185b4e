from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.ranges import coalesce

FILES = [StoredFile(name, 1000, "") for name in "abc"]
RANGES = st.lists(
    st.builds(
        lambda file, start, nbytes: ByteRange(file, start, start + nbytes),
        st.sampled_from(FILES),
        st.integers(0, 300),
        st.integers(0, 40),
    ),
    max_size=30,
)


def make_range(start: int, stop: int, file: StoredFile = FILES[0]) -> ByteRange:
    return ByteRange(file, start, stop)


@pytest.mark.parametrize(
    ("pairs", "max_nbytes", "expected"),
    [
        ([], 100, []),
        ([(5, 5)], 100, [(5, 5, (0,))]),
        ([(0, 10), (10, 20), (20, 30)], 100, [(0, 30, (0, 1, 2))]),
        ([(20, 30), (0, 10), (10, 20)], 100, [(0, 30, (1, 2, 0))]),
        ([(0, 10), (10, 20), (20, 30)], 20, [(0, 20, (0, 1)), (20, 30, (2,))]),
        ([(0, 10), (11, 20)], 100, [(0, 10, (0,)), (11, 20, (1,))]),
        ([(0, 500), (500, 501)], 100, [(0, 500, (0,)), (500, 501, (1,))]),
        ([(0, 500), (10, 20), (499, 600)], 100, [(0, 600, (0, 1, 2))]),
        ([(0, 10), (0, 10)], 100, [(0, 10, (0, 1))]),
    ],
)
def test_worked_examples(
    pairs: list[tuple[int, int]], max_nbytes: int, expected: list[tuple[int, int, tuple[int, ...]]]
) -> None:
    groups = coalesce([make_range(*pair) for pair in pairs], max_nbytes=max_nbytes)
    assert [(group.start, group.stop, group.members) for group in groups] == expected


@pytest.mark.parametrize(
    ("max_gap", "expected"), [(0, [(0, 10), (12, 20), (23, 30)]), (2, [(0, 20), (23, 30)]), (3, [(0, 30)])]
)
def test_small_gaps_are_spanned(max_gap: int, expected: list[tuple[int, int]]) -> None:
    ranges = [make_range(12, 20), make_range(0, 10), make_range(23, 30)]
    groups = coalesce(ranges, max_nbytes=100, max_gap=max_gap)
    assert [(group.start, group.stop) for group in groups] == expected
    assert len(coalesce(ranges, max_nbytes=20, max_gap=3)) == 2


def test_files_are_kept_apart_in_order_of_appearance() -> None:
    ranges = [make_range(0, 10, FILES[1]), make_range(10, 20, FILES[0]), make_range(10, 20, FILES[1])]
    groups = coalesce(ranges, max_nbytes=100)
    assert [(group.file.url, group.nbytes, group.members) for group in groups] == [("b", 20, (0, 2)), ("a", 10, (1,))]


@given(RANGES, st.integers(1, 200))
def test_every_range_is_in_one_group_and_no_byte_in_two(ranges: list[ByteRange], max_nbytes: int) -> None:
    groups = coalesce(ranges, max_nbytes=max_nbytes)
    assert sorted(member for group in groups for member in group.members) == list(range(len(ranges)))
    assert list(dict.fromkeys(group.file for group in groups)) == list(dict.fromkeys(item.file for item in ranges))
    for group in groups:
        items = [ranges[member] for member in group.members]
        assert all(item.file == group.file for item in items)
        assert group.start == min(item.start for item in items)
        assert group.stop == max(item.stop for item in items)
        assert [item.start for item in items] == sorted(item.start for item in items)
        covered = {byte for item in items for byte in range(item.start, item.stop)}
        assert group.nbytes == len(covered)
        if group.nbytes > max_nbytes:
            assert len(covered) < sum(item.nbytes for item in items) or len([i for i in items if i.nbytes]) == 1
    for file in FILES:
        of_file = [group for group in groups if group.file == file]
        assert all(one.stop <= other.start for one, other in pairwise(of_file))


@given(RANGES, st.integers(1, 200))
def test_neighbours_that_fit_are_joined(ranges: list[ByteRange], max_nbytes: int) -> None:
    groups = coalesce(ranges, max_nbytes=max_nbytes)
    for one, other in pairwise(groups):
        if one.file == other.file and other.start == one.stop:
            first = ranges[other.members[0]]
            assert first.stop - one.start > max_nbytes
