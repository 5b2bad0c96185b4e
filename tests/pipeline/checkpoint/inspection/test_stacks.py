"""Tensors by layer, of layouts that checkpoints have."""

from __future__ import annotations

import pytest

from raymerge.pipeline.checkpoint.inspection.stacks import split_stacks
from raymerge.pipeline.checkpoint.source import StoredTensor
from tests.pipeline.plan.layouts import Layout, bare, llama, stored_tensors


def found_tensors(layout: Layout) -> list[StoredTensor]:
    return list(stored_tensors("m", layout).values())


STACKS: dict[str, tuple[Layout, int | None, list[tuple[str, list[list[tuple[int, int]]]]], int]] = {
    "llama": (llama(3), 3, [("model.layers.", [[(0, 3)]])], 3),
    "layers past the counted ones": (llama(3, past=1), 3, [("model.layers.", [[(0, 4)]])], 3),
    "no layers": (bare(["a", "b.weight"]), None, [], 2),
    "one layer": (bare(["h.0.w", "wte"]), 1, [("h.", [[(0, 1)]])], 1),
    "from the middle": (bare(["h.7.w", "h.8.w", "h.9.w"]), None, [("h.", [[(7, 10)]])], 0),
    "with a gap": (bare(["h.0.w", "h.1.w", "h.3.w"]), None, [("h.", [[(0, 2), (3, 4)]])], 0),
    "a sequence of modules": (bare(["mlp.0.weight", "mlp.2.weight"]), None, [], 2),
    "dense, then experts": (
        bare(["h.0.a", "h.1.e.0.a", "h.1.e.1.a", "h.2.e.0.a", "h.2.e.1.a", "h.3.a"]), 4,
        [("h.", [[(0, 1), (3, 4)], [(1, 3)]])], 0,
    ),
    "same names, other shapes": (
        Layout({"h.0.w": (2, 2), "h.1.w": (2, 3), "h.2.w": (2, 2)}), None,
        [("h.", [[(0, 1), (2, 3)], [(1, 2)]])], 0,
    ),
    "same shapes, other dtypes": (
        Layout({"h.0.w": (2,), "h.1.w": (2,)}, dtypes={"h.1.w": "F32"}), None, [("h.", [[(0, 1)], [(1, 2)]])], 0,
    ),
    "two stacks, the counted one first": (
        bare([*(f"a.blocks.{k}.w" for k in range(2)), *(f"z.layers.{k}.w" for k in range(3))]), 3,
        [("z.layers.", [[(0, 3)]]), ("a.blocks.", [[(0, 2)]])], 0,
    ),
    "numbers of two digits": (bare(f"h.{k}.w" for k in range(12)), 12, [("h.", [[(0, 12)]])], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", STACKS)
def test_stacks(name: str) -> None:
    layout, count, expected, num_outside = STACKS[name]
    tensors = found_tensors(layout)
    stacks, outside = split_stacks(tensors, count)
    assert [(s.prefix, [list(kind.layers) for kind in s.kinds]) for s in stacks] == expected
    assert len(outside) == num_outside
    assert sum(stack.total.num_tensors for stack in stacks) + len(outside) == len(tensors)
