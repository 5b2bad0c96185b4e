"""Compares a fine-tune with its base: how each tensor is extracted, and blocks of its difference."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch

from raymerge.ops.decoders.decoder import Raw
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.views.tying import is_head
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import escaped, listing
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.stores.open import Stores

_LOOKUPS = tuple(
    f"{name}.weight"
    for name in (
        *("embed_tokens", "wte", "wpe", "word_embeddings", "position_embeddings", "token_type_embeddings"),
        *("embed_in", "tok_embeddings", "embed_positions", "shared"),
    )
)
"""Endings of the names of matrices whose rows are looked up: no input is multiplied with them."""
_CONV1D = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
"""Models whose linear layers store inputs x outputs."""

BLOCK_ELEMENTS = 2**22
"""Elements of a tensor that are compared at once."""


class Kind(Enum):
    """The way in which a tensor that differs is extracted."""

    LINEAR = "outputs x inputs"
    TURNED = "inputs x outputs"
    EMBEDDING = "rows that are looked up"
    WHOLE = "as it is"


@dataclass(frozen=True, slots=True)
class Pair:
    """A tensor of both models."""

    name: str
    tuned: Source
    base: Source
    kind: Kind

    @property
    def module(self) -> str:
        """The name of its module."""
        return self.name.removesuffix(".weight")


def pair_tensors(tuned_model: Model, base_model: Model, *, with_embeddings: bool) -> list[Pair]:
    """Return the tensors of both models, in the order of the fine-tune's files.

    Args:
        tuned_model: the fine-tune.
        base_model: what it was made from.
        with_embeddings: whether embedding and head are extracted as factors, too.

    Raises:
        TensorMismatchError: they are not a fine-tune and its base.
    """
    tuned, base = tuned_model.view, base_model.view
    is_turned = tuned_model.config.get("model_type") in _CONV1D
    names, base_names = dict.fromkeys(tuned.names()), set(base.names())
    strangers = [name for name in names if name not in base_names] or sorted(base_names - names.keys())
    if strangers:
        there, here = (tuned, base) if strangers[0] in names else (base, tuned)
        named = listing(map(escaped, strangers))
        raise TensorMismatchError(f"{named} in {there.ref}, but not in {here.ref}; is one a fine-tune of the other?")
    pairs = []
    for name in names:
        mine, other = tuned.find(name), base.find(name)
        assert mine is not None
        assert other is not None
        is_lookup = name.endswith(_LOOKUPS)
        is_vocabulary = is_lookup or is_head(name)
        is_matrix = name.endswith(".weight") and len(mine.shape) == 2 and min(mine.shape) > 1
        is_resized = mine.shape[1:] == other.shape[1:] and is_vocabulary and len(mine.shape) == 2
        if mine.shape != other.shape and not is_resized:
            raise TensorMismatchError(
                f"{name} is {list(mine.shape)} in {tuned.ref} and {list(other.shape)} in {base.ref};"
                " is one a fine-tune of the other?"
            )
        may_be = with_embeddings and mine.shape == other.shape if is_vocabulary else True
        is_float = DTYPES[mine.dtype].is_mergeable and DTYPES[other.dtype].is_mergeable
        kind = Kind.EMBEDDING if is_lookup else Kind.TURNED if is_turned and not is_vocabulary else Kind.LINEAR
        pairs.append(Pair(name, mine, other, kind if is_matrix and may_be and is_float else Kind.WHOLE))
    return pairs


def is_changed(stores: Stores, pair: Pair) -> bool:
    """Return whether any value of a tensor differs."""
    if pair.tuned.shape != pair.base.shape:
        return True
    if not DTYPES[pair.tuned.dtype].is_mergeable:
        ends = [(0, source.num_elements) for source in (pair.tuned, pair.base)]
        first, other = (
            b"".join(stores.read_ranges(source.ranges(*end)))
            for source, end in zip((pair.tuned, pair.base), ends, strict=True)
        )
        return first != other
    return any(bool(block.any()) for block in read_differences(stores, pair))


def read_differences(stores: Stores, pair: Pair) -> Iterator[torch.Tensor]:
    """Yield fine-tune minus base, in float32, some rows at a time."""
    columns = max(1, pair.tuned.shape[-1]) if pair.tuned.shape else 1
    step = max(1, BLOCK_ELEMENTS // columns) * columns
    for start in range(0, pair.tuned.num_elements, step):
        stop = min(start + step, pair.tuned.num_elements)
        tuned, base = (_read(stores, source, start, stop) for source in (pair.tuned, pair.base))
        yield tuned.sub_(base).view(-1, columns)


def read_values(stores: Stores, source: Source) -> Iterator[torch.Tensor]:
    """Yield a tensor's values in float32, some at a time."""
    for start in range(0, source.num_elements, BLOCK_ELEMENTS):
        yield _read(stores, source, start, min(start + BLOCK_ELEMENTS, source.num_elements))


def _read(stores: Stores, source: Source, start: int, stop: int) -> torch.Tensor:
    pieces: Sequence[torch.Tensor] = [
        torch.frombuffer(bytearray(piece), dtype=torch.uint8)
        for piece in stores.read_ranges(source.ranges(start, stop))
    ]
    return source.decoder.decode(Raw(pieces, start, stop), start, stop, torch.empty(stop - start))
