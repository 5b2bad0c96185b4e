"""The inputs that machines of a cluster have to reach."""

from __future__ import annotations

from pathlib import Path

from raymerge import __version__
from raymerge.pipeline.evaluation.subjects import Planned, Subject
from raymerge.pipeline.evaluation.units import Unit
from raymerge.pipeline.evaluation.workers import list_inputs
from raymerge.pipeline.spectrum.record import Point, Spectrum
from raymerge.pipeline.stores.open import Stores

CONFIG = """
merge_method: fisher
models:
- model: s3://bucket/a
  fisher: s3://bucket/fisher-a
- model: /models/b
  fisher: /models/fisher-b
"""


def test_statistics_of_a_planned_point_are_reached_as_well_as_models(tmp_path: Path, stores: Stores) -> None:
    point = Point("x", "x", {}, CONFIG, "", "planned", "")
    planned = Planned(str(tmp_path), Spectrum(__version__, "", (), (), (point,)), point)
    found = list_inputs(stores, Unit(Subject("x", "", "x", planned), "", ()), None)
    assert found == ["s3://bucket/a", "/models/b", "s3://bucket/fisher-a", "/models/fisher-b"]
