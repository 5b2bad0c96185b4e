"""A model with a LoRA adapter: every tensor of the adapter changes one of the model's, or is an error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass

from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.checkpoint.adapters.fitting import find_rank, fit_matrix, fit_stack
from raymerge.pipeline.checkpoint.adapters.modules import Parts, find_renaming, list_modules, rename, sort_tensors
from raymerge.pipeline.checkpoint.adapters.scale import find_scale
from raymerge.pipeline.checkpoint.adapters.source import (
    ReplacedTensor,
    RescaledTensor,
    ShiftedTensor,
    Update,
    UpdatedTensor,
)
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.checkpoint.views.tying import find_embedding, is_head
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.errors import CheckpointError, TensorMismatchError
from raymerge.pipeline.messages import counted, escaped, listing


@dataclass(frozen=True, slots=True)
class AdapterSummary:
    """The changes that an adapter makes to its model."""

    ref: ModelRef
    url: str
    ranks: tuple[int, ...]
    """Ranks of its updates, the most frequent first."""
    num_updated: int
    """Tensors that get a low-rank update."""
    num_replaced: int
    """Tensors that it stores whole."""
    num_tensors: int
    """Tensors of the model."""

    def __str__(self) -> str:
        ranks = ", ".join(map(str, self.ranks[:4])) + (", ..." if self.ranks[4:] else "")
        of_rank = f", rank {ranks}" if self.ranks else ""
        replaced = f", and replaces {self.num_replaced:,}" if self.num_replaced else ""
        return f"{self.ref} changes {self.num_updated:,} of {counted(self.num_tensors, 'tensor')}{of_rank}{replaced}"


class AdapterView(View):
    """A model plus the updates of an adapter."""

    def __init__(self, below: View, adapter: Adapter, ref: ModelRef) -> None:
        """Look at a model with an adapter.

        Args:
            below: the model as it is stored.
            adapter: its adapter.
            ref: the config's name for both.

        Raises:
            TensorMismatchError: a module of the adapter is none of the model's, or has another shape.
            CheckpointError: a tensor of the adapter has no known meaning.
        """
        self.ref = ref
        self._below = below
        self._adapter = adapter
        content = sort_tensors(adapter)
        known = list_modules(below.names())
        wanted = [*content.updates, *content.whole]
        beginnings = find_renaming([name for name in wanted if not _is_head(name)], known)
        if beginnings is None:
            raise self._explain_strangers([name for name in wanted if name not in known])
        self._changed: dict[str, Source] = {}
        for name, stored in content.whole.items():
            self._replace(rename(name, beginnings, known), stored)
        self._num_replaced = len(self._changed)
        self._ranks: list[int] = []
        self._layouts: set[bool] = set()
        """Whether weights are inputs x outputs, as far as those say that are not square."""
        updates = [(module, rename(module, beginnings, known), several) for module, several in content.updates.items()]
        for update in sorted(updates, key=lambda update: self._is_square(update[1])):
            self._update(*update)

    def names(self) -> Collection[str]:
        """Return the names below, and that of a head that the adapter adds."""
        return dict.fromkeys((*self._below.names(), *self._changed))

    def find(self, name: str) -> Source | None:
        """Return a tensor as the adapter has it, or else the model."""
        return self._changed.get(name) or self._below.find(name)

    def hidden(self) -> Mapping[str, str]:
        """Return those below."""
        return self._below.hidden()

    def seen(self, stored: str) -> str:
        """Return the name below."""
        return self._below.seen(stored)

    def changed_names(self) -> Collection[str]:
        """Return the names of the tensors that the adapter changes, or adds."""
        return self._changed.keys()

    def summarise(self) -> AdapterSummary:
        """Return what the adapter does to the model."""
        return AdapterSummary(
            ref=self._adapter.ref,
            url=self._adapter.url,
            ranks=tuple(rank for rank, _ in Counter(self._ranks).most_common()),
            num_updated=sum(not isinstance(source, ReplacedTensor) for source in self._changed.values()),
            num_replaced=self._num_replaced,
            num_tensors=len(self._below.names()),
        )

    def _replace(self, name: str, stored: StoredTensor) -> None:
        """Have a tensor that the adapter stores whole seen in place of the model's own."""
        own = self._find_own(name)
        if own is None:
            raise self._explain_strangers([name])
        is_vocabulary = len(own.shape) == 2 and stored.shape[1:] == own.shape[1:]
        if stored.shape != own.shape and not (is_vocabulary and (is_head(name) or self._is_embedding(name))):
            raise self._misfit([(name, own)], stored)
        dtype = own.dtype if DTYPES[stored.dtype].is_mergeable else stored.dtype
        self._changed[name] = ReplacedTensor(str(self.ref), name, dtype, stored.shape, stored)

    def _is_square(self, name: str) -> bool:
        own = self._find_own(f"{name}.weight")
        return own is not None and len(own.shape) == 2 and own.shape[0] == own.shape[1]

    def _update(self, module: str, name: str, several: list[Parts]) -> None:
        """Have the tensors of a module seen with their updates.

        Args:
            module: as the adapter calls it.
            name: as the model does.
            several: the updates.
        """
        weight = f"{name}.weight"
        own = self._find_own(weight)
        if own is None or len(several) > 1:
            self._update_parameters(module, name, several)
            return
        (parts,) = several
        a, b = parts.get("A", self._adapter, module), parts.get("B", self._adapter, module)
        rank = find_rank(a, b)
        if not rank or not own.num_elements:
            raise self._misfit([(weight, own)], a, b)
        prefers_turned = parts.is_embedding or self._adapter.config.is_transposed or self._layouts == {True}
        scale = find_scale(self._adapter, module, rank)
        update = fit_matrix(own.shape, a, b, scale, prefers_turned=prefers_turned)
        if update is None:
            raise self._misfit([(weight, own)], a, b)
        if not parts.is_embedding:
            self._layouts.add(update.is_turned)
        updated = self._note(weight, own, own.shape[0], 1, update)
        if norms := parts.factors.get("magnitude"):
            self._rescale(module, updated, norms)
        elif self._adapter.config.use_dora:
            raise CheckpointError(f"{self._adapter.url}: {module} has no lora_magnitude_vector, and use_dora is true")
        if added := parts.factors.get("bias"):
            self._shift(module, f"{name}.bias", added, scale)

    def _update_parameters(self, module: str, name: str, several: list[Parts]) -> None:
        """Have parameters of a module, such as those of fused experts, seen with their updates."""
        targets = self._adapter.config.target_parameters
        own: dict[str, Source] = {}
        for candidate in self._below.names():
            inside, _, parameter = candidate.rpartition(".")
            source = self._below.find(candidate) if inside == name else None
            if source is not None and any(f".{module}.{parameter}".endswith(f".{target}") for target in targets):
                own[candidate] = source
        if not own:
            raise self._explain_strangers([module])
        for parts in several:
            a, b = parts.get("A", self._adapter, module), parts.get("B", self._adapter, module)
            found = {key: update for key, source in own.items() if (update := self._fit(module, source, a, b))}
            if len(found) != 1:
                raise self._misfit([(key, own[key]) for key in found or own], a, b)
            ((key, update),) = found.items()
            source = own.pop(key)
            number = source.shape[0] if len(source.shape) == 3 else 1
            self._note(key, source, number * source.shape[-2], number, update)

    def _fit(self, module: str, own: Source, a: StoredTensor, b: StoredTensor) -> Update | None:
        """Return the update of a parameter; None where it does not fit, or it cannot be told how it does."""
        number = own.shape[0] if len(own.shape) == 3 else 1
        ranks = find_rank(a, b)
        if len(own.shape) not in (2, 3) or not own.num_elements or not ranks or ranks % number:
            return None
        scale = find_scale(self._adapter, module, ranks // number)
        if len(own.shape) == 2:
            return fit_matrix(own.shape, a, b, scale, prefers_turned=False)
        return fit_stack(own.shape, a, b, scale)

    def _note(self, name: str, own: Source, num_rows: int, num_matrices: int, update: Update) -> UpdatedTensor:
        """Have a tensor seen with an update."""
        model = str(self.ref)
        updated = UpdatedTensor(model, name, own.dtype, own.shape, own, num_rows, num_matrices, (update,))
        self._changed[name] = updated
        self._ranks.append(update.term.rank)
        return updated

    def _rescale(self, module: str, updated: UpdatedTensor, norms: StoredTensor) -> None:
        """Have a tensor seen with the norms of DoRA."""
        shape = updated.shape
        if len(shape) != 2 or updated.updates[0].is_turned:
            raise CheckpointError(
                f"{self._adapter.url}: {module} has DoRA's norms (lora_magnitude_vector), and is an embedding, a"
                " convolution, or stored as inputs x outputs (fan_in_fan_out); apply that by peft"
                " (model.merge_and_unload()), and merge the result"
            )
        if norms.shape != shape[:1]:
            raise self._misfit([(updated.name, updated)], norms)
        self._changed[updated.name] = RescaledTensor(updated.model, updated.name, updated.dtype, shape, updated, norms)

    def _shift(self, module: str, name: str, added: StoredTensor, scale: float) -> None:
        """Have a bias seen with what the adapter adds to it."""
        own = self._find_own(name)
        if own is None:
            raise self._explain_strangers([f"{module}.bias"])
        if own.shape != added.shape:
            raise self._misfit([(name, own)], added)
        self._changed[name] = ShiftedTensor(str(self.ref), name, own.dtype, own.shape, own, added, scale)

    def _find_own(self, name: str) -> Source | None:
        """Return a tensor before its update; of a head that is not stored, the embedding that it is tied to."""
        source = self._changed.get(name) or self._below.find(name)
        if source is None and is_head(name):
            embedding = find_embedding(self._below.names())
            source = self._below.find(embedding) if embedding else None
        return source

    def _is_embedding(self, name: str) -> bool:
        return name == find_embedding(self._below.names())

    def _misfit(self, own: list[tuple[str, Source]], *factors: StoredTensor) -> TensorMismatchError:
        given = " and ".join(f"{factor.name} {list(factor.shape)}" for factor in factors)
        there = " or ".join(f"{name} {list(source.shape)}" for name, source in own)
        return TensorMismatchError(
            f"{self._adapter.url}: {given} do not fit {there} of {self._below.ref}, in one way and no other"
            f"{self._say_base()}"
        )

    def _explain_strangers(self, names: list[str]) -> TensorMismatchError:
        return TensorMismatchError(
            f"{self._adapter.url}: {counted(len(names), 'module')} of the adapter are not in {self._below.ref}:"
            f" {listing(map(escaped, names))}{self._say_base()}"
        )

    def _say_base(self) -> str:
        base = self._adapter.config.base
        return f"; the adapter was trained on {base!r:.200}: name that as its model" if base else "; is it its base?"


def _is_head(name: str) -> bool:
    return is_head(name if name.endswith(".weight") else f"{name}.weight")
