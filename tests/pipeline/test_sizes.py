from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.sizes import format_memory, format_nbytes, parse_nbytes


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1), ("1B", 1), (" 12 ", 12), ("2k", 2000), ("2kB", 2000), ("2KiB", 2048), ("3MB", 3 * 10**6),
        ("512mib", 2**29), ("0.5GiB", 2**29), ("5GB", 5 * 10**9), ("1.5 GB", 1_500_000_000), ("2TiB", 2**41),
    ],
)  # fmt: skip
def test_sizes_as_people_write_them(text: str, nbytes: int) -> None:
    assert parse_nbytes(text) == nbytes


@pytest.mark.parametrize(
    "text",
    ["", "GB", "-1GB", "0", "0.1B", "1e9", "1,5GB", "5 G B", "5PB", "nan", "inf", "1.GB", "٣GB", "5GB/s", "9" * 400],
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a size"):
        parse_nbytes(text)


@given(st.integers(1, 2**50))
def test_a_memory_size_is_at_least_what_was_meant(nbytes: int) -> None:
    assert nbytes <= parse_nbytes(format_memory(nbytes)) < nbytes + 2**20


@given(st.integers(0, 2**60))
def test_a_shown_size_is_short_and_close(nbytes: int) -> None:
    text = format_nbytes(nbytes)
    number, unit = text.split()
    factor = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert abs(float(number) * factor - nbytes) <= max(0.006 * nbytes, 0.5)
    assert len(number) <= 4 or unit == "TB"


def test_shown_sizes_do_not_round_up_to_four_digits_in_exponents() -> None:
    assert [format_nbytes(n) for n in (0, 999, 1000, 999_400, 999_600, 1e15)] == [
        "0 B", "999 B", "1 kB", "999 kB", "1000 kB", "1000 TB",
    ]  # fmt: skip
