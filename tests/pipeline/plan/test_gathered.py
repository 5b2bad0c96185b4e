"""Tensors whose shapes cannot be those of a model, or are not those of its config.json."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.pipeline.errors import CheckpointError
from tests.pipeline.plan.layouts import Layout, expand_layouts, linear, llama, passthrough

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("empty", [(0,), (1,)])
@pytest.mark.parametrize("only_matrices", [False, True])
def test_tensors_that_were_never_gathered_are_refused(empty: tuple[int, ...], only_matrices: bool) -> None:
    whole = llama()
    shapes = {name: empty if len(shape) == 2 or not only_matrices else shape for name, shape in whole.shapes.items()}
    models = {"a": Layout(shapes, whole.config), "b": Layout(shapes, whole.config)}
    for config in (linear("a", "b"), passthrough(("a", 0, 1), ("b", 1, 2))):
        with pytest.raises(CheckpointError, match=r"tensors? are empty, such as .*zero_to_fp32.py"):
            expand_layouts(config, models)


def test_a_base_that_is_whole_does_not_hide_an_empty_fine_tune() -> None:
    whole = llama()
    empty = Layout(dict.fromkeys(whole.shapes, (0,)), whole.config)
    with pytest.raises(CheckpointError, match=r"^b: 7 of 7 tensors are empty"):
        expand_layouts(linear("a", "b"), {"a": whole, "b": empty})


def test_some_tensors_may_be_empty() -> None:
    whole = llama()
    layout = Layout({**whole.shapes, "model.layers.0.extra": (0, 16), "model.scale": ()}, whole.config)
    assert expand_layouts(linear("a", "b"), {"a": layout, "b": layout}).warnings == ()


@pytest.mark.parametrize(
    ("stated", "warned"),
    [
        ({"vocab_size": 8, "hidden_size": 4}, []),
        ({"vocab_size": 9, "hidden_size": 4}, ["vocab_size 9"]),
        ({"vocab_size": 9, "hidden_size": 5}, ["vocab_size 9", "hidden_size 5"]),
        ({"vocab_size": 8, "hidden_size": 16, "embedding_size": 4}, []),
        ({"vocab_size": "8"}, ['vocab_size "8"']),
    ],
)
def test_the_embedding_is_compared_with_config_json(stated: dict[str, Any], warned: list[str]) -> None:
    layout = llama(**stated)
    warnings = expand_layouts(linear("a"), {"a": layout}).warnings
    assert [text for text in warnings if f"{EMBEDDING} is [8, 4]" in text] == list(warnings)
    assert len(warnings) == len(warned)
    assert all(text in warning for text, warning in zip(warned, warnings, strict=True))


def test_rows_of_the_embedding_alone() -> None:
    """Llama 3.2 Vision has some for images, which the head lacks."""
    layout = llama(vocab_size=8)
    layout = Layout({**layout.shapes, EMBEDDING: (16, 4)}, layout.config)
    assert expand_layouts(linear("a"), {"a": layout}).warnings == ()
