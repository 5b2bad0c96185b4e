"""Tensors by layer: which layers a checkpoint has, and whether they are alike."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from math import prod

from raymerge.pipeline.checkpoint.names import find_layers, natural_key, split_name
from raymerge.pipeline.checkpoint.source import StoredTensor


@dataclass(frozen=True, slots=True)
class Totals:
    """Some tensors together."""

    num_tensors: int
    num_parameters: int
    """Elements of all of them."""
    nbytes: int


@dataclass(frozen=True, slots=True)
class LayerKind:
    """Layers of a stack that have the same tensors, of the same shapes and dtypes."""

    layers: tuple[tuple[int, int], ...]
    """Their numbers, as half-open runs [start, stop)."""
    each: Totals
    """Totals of one layer."""


@dataclass(frozen=True, slots=True)
class Stack:
    """Tensors that are numbered by layer."""

    prefix: str
    """The name before the number, such as `model.layers.`."""
    num_layers: int
    """Layers that are there, whatever config.json counts."""
    kinds: tuple[LayerKind, ...]
    """One, where all layers are alike."""
    total: Totals


def add_up(tensors: Sequence[StoredTensor]) -> Totals:
    """Return how many tensors there are, and how large they are together."""
    return Totals(len(tensors), sum(prod(tensor.shape) for tensor in tensors), sum(tensor.nbytes for tensor in tensors))


def split_stacks(
    tensors: Sequence[StoredTensor], config_num_layers: int | None
) -> tuple[tuple[Stack, ...], tuple[StoredTensor, ...]]:
    """Return the layer stacks, and the tensors that are in none.

    A stack may begin anywhere: a single file of a checkpoint has some layers from the middle. Two numbers that are not
    neighbours, as modules of a sequence have, are no stack.
    """
    main = find_layers(((tensor.name, tensor.nbytes) for tensor in tensors), config_num_layers).main
    members: defaultdict[str, defaultdict[int, list[StoredTensor]]] = defaultdict(lambda: defaultdict(list))
    for tensor in tensors:
        split = split_name(tensor.name)
        if split is not None:
            members[split.stack][split.layer].append(tensor)
    stacks = {
        prefix: _make_stack(prefix, layers)
        for prefix, layers in members.items()
        if len(layers) > 2 or max(layers) - min(layers) == len(layers) - 1
    }
    ordered = sorted(stacks, key=lambda prefix: (prefix != main, natural_key(prefix)))
    outside = (t for t in tensors if (split := split_name(t.name)) is None or split.stack not in stacks)
    return tuple(stacks[prefix] for prefix in ordered), tuple(outside)


def _make_stack(prefix: str, layers: Mapping[int, Sequence[StoredTensor]]) -> Stack:
    kinds: defaultdict[frozenset[tuple[str, str, tuple[int, ...]]], list[int]] = defaultdict(list)
    for layer in sorted(layers):
        begin = len(f"{prefix}{layer}.")
        kinds[frozenset((tensor.name[begin:], tensor.dtype, tensor.shape) for tensor in layers[layer])].append(layer)
    return Stack(
        prefix,
        len(layers),
        tuple(LayerKind(_find_runs(alike), add_up(layers[alike[0]])) for alike in kinds.values()),
        add_up([tensor for each in layers.values() for tensor in each]),
    )


def _find_runs(numbers: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Return rising numbers as runs [start, stop)."""
    groups = (list(group) for _, group in groupby(enumerate(numbers), key=lambda item: item[1] - item[0]))
    return tuple((group[0][1], group[-1][1] + 1) for group in groups)
