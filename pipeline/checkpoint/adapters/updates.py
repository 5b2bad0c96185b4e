"""Adapters by themselves: the updates that they are made of, without a model to apply them to."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from raymerge.ops.decoders.low_rank import Term
from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.checkpoint.adapters.fitting import find_rank
from raymerge.pipeline.checkpoint.adapters.modules import Parts, sort_tensors
from raymerge.pipeline.checkpoint.adapters.scale import find_scale
from raymerge.pipeline.checkpoint.adapters.source import Update, make_factor
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.errors import CheckpointError, TensorMismatchError

APPLY = "apply the adapters to their base, as `model: BASE+ADAPTER` with `base_model: BASE`, which gives a model"
"""The way out where an update depends on the weights that it is added to."""


@dataclass(frozen=True, slots=True)
class ModuleUpdate:
    """The update of one module: scale * b @ a, outputs x inputs; of an embedding, width x rows."""

    a: StoredTensor
    """Rank x inputs; of a convolution, rank x inputs x kernel."""
    b: StoredTensor
    """Outputs x rank."""
    scale: float
    is_embedding: bool
    bias: StoredTensor | None
    """Addend of the module's bias, before it is scaled."""

    @property
    def rank(self) -> int:
        """Rows of `a`."""
        return self.a.shape[0]

    @property
    def layout(self) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
        """Everything but the rank that updates of one module have in common: shapes, and the kind of module."""
        return (self.b.shape[0], *self.b.shape[2:]), self.a.shape[1:], self.is_embedding

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns of the update, with a kernel's elements as columns."""
        return self.b.shape[0], math.prod(self.a.shape[1:])

    def as_term(self, factor: float = 1.0) -> Update:
        """Return the update times a factor, as a term of a low-rank sum."""
        left = make_factor(self.b, (0, self.rank, 1), is_whole=False)
        right = make_factor(self.a, (0, self.shape[1], 1))
        return Update(Term(self.rank, self.scale * factor, left, right), self.b, self.a, is_turned=False)


@dataclass(frozen=True, slots=True)
class Updates:
    """The changes that one adapter makes."""

    ref: ModelRef
    adapter: Adapter
    modules: Mapping[str, ModuleUpdate]
    whole: Mapping[str, StoredTensor]
    """Tensors in place of the model's own, by the model's names."""


def read_updates(adapter: Adapter) -> Updates:
    """Return the updates of an adapter.

    Raises:
        CheckpointError: a tensor has no known meaning, or an update depends on the weights that it is added to.
        TensorMismatchError: two factors do not go together.
    """
    content = sort_tensors(adapter)
    if targets := adapter.config.target_parameters:
        raise CheckpointError(
            f"{adapter.url}: target_parameters is {list(targets)}: how factors of fused experts are cut follows from"
            f" the model; {APPLY}"
        )
    modules = {}
    for module, several in content.updates.items():
        if len(several) > 1:
            raise CheckpointError(f"{adapter.url}: {module} has {len(several)} updates, of parameters; {APPLY}")
        modules[module] = _read_module(adapter, module, several[0])
    return Updates(adapter.ref, adapter, modules, content.whole)


def _read_module(adapter: Adapter, module: str, parts: Parts) -> ModuleUpdate:
    a, b = parts.get("A", adapter, module), parts.get("B", adapter, module)
    if adapter.config.use_dora or "magnitude" in parts.factors:
        raise CheckpointError(
            f"{adapter.url}: {module} has DoRA's norms (use_dora), so that its update depends on the weights that it is"
            f" added to; {APPLY}"
        )
    rank = find_rank(a, b)
    if not rank or not a.num_elements or not b.num_elements:
        raise TensorMismatchError(
            f"{adapter.url}: {a.name} {list(a.shape)} and {b.name} {list(b.shape)} are no factors of one update"
        )
    bias = parts.factors.get("bias")
    if bias is not None and bias.shape != b.shape[:1]:
        raise TensorMismatchError(
            f"{adapter.url}: {bias.name} {list(bias.shape)} does not fit {b.name} {list(b.shape)}"
        )
    return ModuleUpdate(a, b, find_scale(adapter, module, rank), parts.is_embedding, bias)
