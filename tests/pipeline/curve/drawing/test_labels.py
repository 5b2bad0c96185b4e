from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from raymerge.pipeline.curve.drawing.labels import Spot, place_labels

SPOTS = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=60), st.builds(Spot, st.floats(0, 1), st.floats(0, 1)), max_size=20
)


@given(SPOTS)
def test_major_names_are_all_there_and_others_where_there_is_room(spots: dict[str, Spot]) -> None:
    names = list(spots)
    labels = place_labels(spots, names, major=names[:2])
    assert set(names[:2]) <= labels.keys() <= set(names)
    assert all(len(label.text) <= 40 for label in labels.values())


def test_names_keep_clear_of_each_other() -> None:
    far = place_labels(
        {name: Spot(x, x) for name, x in (("a", 0.0), ("b", 0.5), ("c", 1.0))}, ["a", "b", "c"], major=()
    )
    assert [label.side for label in far.values()] == ["right", "above", "left"]
    crowd = {
        name: Spot(0.5 + index / 1000, 0.5)
        for index, name in enumerate(["first", "second", "third", "fourth", "fifth"])
    }
    spread = place_labels({**crowd, "left": Spot(0, 0), "right": Spot(1, 1)}, list(crowd), major=())
    sides = [label.side for label in spread.values()]
    assert len(set(sides)) == len(sides) < len(crowd)
