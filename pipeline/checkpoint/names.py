"""Layers of tensors, read from the tensors' own names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

_NUMBER = re.compile(r"(?:^|\.)(0|[1-9][0-9]{0,5})\.")
"""A layer's number as checkpoints write it; with leading zeros it is a name like any other."""
CAUSAL_MASKS = (".attn.bias", ".attention.bias")
"""Names of buffers of shape [1, 1, n, n]; in any other shape, such a tensor is a weight."""
OPTIONAL_BUFFERS = (".masked_bias", ".position_ids", *CAUSAL_MASKS)
"""Names of buffers that checkpoints of one model may have or lack."""
COMPUTED_BUFFER = "rotary_emb.inv_freq"
"""Name of a buffer that models compute when they are loaded."""
OTHER_SENSES = re.compile(r"vision|visual|image|audio|speech|video")
"""Words in names of tensors and of config.json's fields for parts that are not a language model."""
_INPUT_SIDE = re.compile(r"encoder|qformer|projector|connector|resampler|perceiver")
"""Words in names of stacks that come before a language model's own, where it has one besides."""
_DIGITS = re.compile(r"([0-9]+)")


@dataclass(frozen=True, slots=True)
class LayerName:
    """A tensor's name, split at its first number."""

    stack: str
    """The name before the number, such as `model.layers.`."""
    layer: int
    rest: str
    """The name after the number, such as `self_attn.q_proj.weight`."""


@dataclass(frozen=True, slots=True)
class Layers:
    """The layer stacks of one checkpoint."""

    stacks: Mapping[str, int]
    """Length of each stack that is numbered 0, 1, 2, ... without gaps."""
    main: str
    """The stack that config.json counts, or the largest; empty where there is none."""
    num_layers: int
    """Layers of the main stack that config.json counts: multi-token prediction heads may follow in the same stack."""

    def position(self, name: str) -> float:
        """Return where on a gradient a tensor lies: layer / (layers - 1), and 0 for tensors outside a stack.

        A stack of one layer lies at 1 (mergekit does so); layers past the counted ones, too.
        """
        split = split_name(name)
        if split is None or split.stack not in self.stacks:
            return 0.0
        num_layers = self.num_layers if split.stack == self.main else self.stacks[split.stack]
        return layer_position(split.layer, num_layers)


def layer_position(layer: int, num_layers: int) -> float:
    """Return a layer's place on a gradient from 0 to 1.

    >>> layer_position(0, 3), layer_position(1, 3), layer_position(2, 3), layer_position(0, 1)
    (0.0, 0.5, 1.0, 1.0)
    """
    return 1.0 if num_layers <= 1 else min(1.0, layer / (num_layers - 1))


@lru_cache(maxsize=2**14)  # models of one kind share their names, and each is asked for several times
def split_name(name: str) -> LayerName | None:
    """Split a tensor's name at its first number; None where it has none.

    >>> split_name("model.layers.12.mlp.experts.3.up_proj.weight")
    LayerName(stack='model.layers.', layer=12, rest='mlp.experts.3.up_proj.weight')
    >>> split_name("lm_head.weight")
    """
    match = _NUMBER.search(name)
    if match is None:
        return None
    return LayerName(name[: match.start(1)], int(match[1]), name[match.end() :])


def natural_key(name: str) -> tuple[tuple[tuple[bool, int, str], ...], str]:
    """Return a sorting key that counts layers as numbers, and never is the same for two names.

    >>> sorted(["h.10.w", "h.2.w", "a"], key=natural_key)
    ['a', 'h.2.w', 'h.10.w']
    """
    parts = _DIGITS.split(name)  # text and digits in turn
    return tuple([_number_part(part) if k % 2 else (True, 0, part) for k, part in enumerate(parts) if part]), name


def find_layers(nbytes_by_name: Iterable[tuple[str, int]], num_hidden_layers: int | None) -> Layers:
    """Find the layer stacks of a checkpoint.

    Args:
        nbytes_by_name: each tensor's name and size.
        num_hidden_layers: config.json's count, if it has one.
    """
    members: dict[str, set[int]] = {}
    nbytes: dict[str, int] = {}
    for name, size in nbytes_by_name:
        split = split_name(name)
        if split is not None:
            members.setdefault(split.stack, set()).add(split.layer)
            nbytes[split.stack] = nbytes.get(split.stack, 0) + size
    stacks = {stack: len(layers) for stack, layers in members.items() if max(layers) == len(layers) - 1}
    counted = [stack for stack, length in stacks.items() if num_hidden_layers and length >= num_hidden_layers]
    of_language = [stack for stack in counted if not OTHER_SENSES.search(stack)]
    of_output = [stack for stack in of_language if not _INPUT_SIDE.search(stack)]
    main = max(of_output or of_language or counted or stacks, key=lambda stack: (nbytes[stack], stack), default="")
    num_layers = num_hidden_layers if main in counted and num_hidden_layers else stacks.get(main, 0)
    return Layers(stacks, main, num_layers)


def _number_part(part: str) -> tuple[bool, int, str]:
    """Numbers before text, and by size: of two without leading zeros, the longer one is the larger one."""
    digits = part.lstrip("0")
    return False, len(digits), digits
