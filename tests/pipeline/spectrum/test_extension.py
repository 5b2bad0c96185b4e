from __future__ import annotations

from raymerge.pipeline.spectrum.extension import extend
from raymerge.pipeline.spectrum.record import Parent, Point, Spectrum


def make(points: dict[str, tuple[str, str]], parents: tuple[Parent, ...] = ()) -> Spectrum:
    """Return a spectrum of points with a directory and a fingerprint."""
    made = [Point(name, url, {}, "", fingerprint, "complete", "") for name, (url, fingerprint) in points.items()]
    return Spectrum("1", "merge_method: linear\n", (), parents, tuple(made))


def test_a_point_does_not_stay_complete_by_a_model_that_is_replaced() -> None:
    before = make({"a": ("a", "old"), "equal": ("a", "old"), "other": ("other", "x")})
    after = extend(before, make({"a": ("a", "new")}), "s", overwrite=True)
    assert [(point.name, point.url, point.fingerprint, point.state) for point in after.points] == [
        ("a", "a", "new", "complete"),
        ("equal", "equal", "old", "planned"),
        ("other", "other", "x", "complete"),
    ]
    assert extend(after, after, "s", overwrite=False) == after


def test_parents_of_two_sweeps_have_names_of_their_own() -> None:
    before = make({"a": ("a", "1")}, (Parent("m", "/x/m", False), Parent("b", "/x/b", True)))
    new = make({"b": ("b", "2")}, (Parent("m", "/y/m", False), Parent("b-2", "/x/b", True)))
    after = extend(before, new, "s", overwrite=False)
    assert [(parent.name, parent.model) for parent in after.parents] == [
        ("m", "/x/m"),
        ("b-2", "/x/b"),
        ("m-2", "/y/m"),
    ]
    assert extend(after, new, "s", overwrite=False).parents == after.parents
