from __future__ import annotations

import pytest

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.spectrum.ranges import parse_values


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.1:0.9:0.1", [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]),
        ("1:0:-0.25", [1.0, 0.75, 0.5, 0.25, 0.0]),
        ("0:1:0.3", [0.0, 0.3, 0.6, 0.9]),
        ("8:64:28", [8, 36, 64]),
        ("5:5:1", [5]),
        ("1e-3:3e-3:1e-3", [0.001, 0.002, 0.003]),
        ("0.3, 0.5,0.7", [0.3, 0.5, 0.7]),
        ("[0, 1],[1, 0.5, 0]", [[0, 1], [1, 0.5, 0]]),
        ("ties,dare_ties", ["ties", "dare_ties"]),
        ("true,false", [True, False]),
        ("s3://bucket/a,org/b@main", ["s3://bucket/a", "org/b@main"]),
        ("1e-5", [1e-5]),
    ],
)
def test_values_are_what_is_written(text: str, values: list[object]) -> None:
    found = parse_values("t", text)
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("0:1:0", "step 0, and would never end"),
        ("0:inf:1", "has inf, and would never end; give a finite number"),
        ("0:1:-0.1", "never end; write 0:1:0.1"),
        ("1:0:0.1", "never end; write 1:0:-0.1"),
        ("0:1:0.000001", "1,000,001 values, and a sweep at most 1,000"),
        ("0:1", "write start:stop:step, such as 0:1:0.1"),
        ("0:1:2:3", "is no range"),
        ("0:1e99999999:1", "out of reason"),
        ("", "write values as"),
        ("0.1,,0.2", "write values as"),
        ("[0, 1", "write values as"),
    ],
)
def test_what_cannot_be_meant_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        parse_values("--set t", text)
    assert str(caught.value).startswith("--set t: ")
