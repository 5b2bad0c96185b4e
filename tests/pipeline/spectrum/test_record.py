from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.spectrum.record import (
    RECORD,
    Parent,
    Point,
    Spectrum,
    parse_spectrum,
    read_spectrum,
    write_spectrum,
)
from raymerge.pipeline.stores.open import open_stores

SPECTRUM = Spectrum(
    raymerge="1",
    config="merge_method: slerp",
    paths=("t",),
    parents=(Parent("think", "org/think", is_base=True), Parent("answer", "org/answer", is_base=False)),
    points=(
        Point("t-0.1", "t-0.1", {"t": 0.1}, "merge_method: slerp", "abc", "complete", ""),
        Point("t-0.2", "hf://me/s-t-0.2", {"t": [0, 0.2]}, "merge_method: slerp", "", "failed", "no such tensor"),
    ),
)


def test_a_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    with open_stores() as stores:
        write_spectrum(stores, str(tmp_path), SPECTRUM)
        assert read_spectrum(stores, str(tmp_path)) == SPECTRUM


@pytest.mark.parametrize(
    ("content", "said"),
    [("[]", "damaged"), ("{", "damaged"), (json.dumps({"raymerge": "1"}), "damaged"), (None, "has no spectrum.json")],
)
def test_what_is_wrong_with_a_record_is_told(content: str | None, said: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / RECORD).write_text(content)
    with open_stores() as stores, pytest.raises(OutputError, match=said):
        read_spectrum(stores, str(tmp_path))


def test_points_are_sorted_by_their_values_and_by_appearance_where_these_are_no_numbers() -> None:
    def sort(*settings: dict[str, object]) -> list[str]:
        points = [replace(SPECTRUM.points[0], name=str(place), settings=each) for place, each in enumerate(settings)]
        found = replace(SPECTRUM, paths=tuple(settings[0]), points=tuple(points)).sorted_points
        return [point.name for point in found]

    assert sort({"t": 0.2}, {"t": 0.6}, {"t": 0.1}, {"t": 1}) == ["2", "0", "1", "3"]
    assert sort({"t": 0.2}, {"t": [0, 1]}, {"t": 0.1}, {"t": 0.2}) == ["0", "3", "1", "2"]
    assert sort({"m": "ties", "t": 2}, {"m": "dare", "t": 1}, {"m": "ties", "t": 1}) == ["2", "0", "1"]


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "..", "file:///etc", "s3://bucket/x"])
def test_names_that_lead_out_of_the_directory_are_refused(name: str) -> None:
    point, parent = SPECTRUM.points[0], SPECTRUM.parents[0]
    for wrong in (
        replace(SPECTRUM, points=(replace(point, name=name),)),
        replace(SPECTRUM, points=(replace(point, url=name),)),
        replace(SPECTRUM, parents=(replace(parent, name=name),)),
    ):
        with pytest.raises(ValueError, match="is no name of a model"):
            parse_spectrum(wrong.dump().encode())
