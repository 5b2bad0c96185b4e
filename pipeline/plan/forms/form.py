"""The seam between the ways to write a merge and the one path that follows."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace

from raymerge.pipeline.checkpoint.adapters.view import AdapterSummary
from raymerge.pipeline.checkpoint.model_config import Json, text_part
from raymerge.pipeline.checkpoint.names import Layers
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.views.quantised import Quantisation
from raymerge.pipeline.checkpoint.views.tying import find_embedding, find_head, name_head
from raymerge.pipeline.checkpoint.views.view import TiedView, View
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.values import Settings
from raymerge.pipeline.plan.sources.resolve import Scope

EMBEDDING_FIELDS = ("vocab_size", "hidden_size")
"""Fields of config.json for the rows and columns of an embedding."""


@dataclass(frozen=True, slots=True)
class Model:
    """One input as a form sees it."""

    view: View
    config: Json
    layers: Layers
    is_tied: bool
    """Whether its output head is its embedding."""
    stored: Collection[str]
    """Every tensor of its files: each is merged, or left out by a rule that the plan prints."""
    quantisation: Quantisation
    """Evidence that the stored numbers are not the weights."""
    statistics: View | None = None
    """Statistics of it that a method takes besides its tensors."""
    adapter: AdapterSummary | None = None
    """Changes that its adapter makes."""
    lacks: Collection[str] = frozenset()
    """Names of others that a language model need not have, because they are parts of a multimodal one."""

    @property
    def ref(self) -> ModelRef:
        """The config's name for it."""
        return self.view.ref

    def width(self, field: str) -> int | None:
        """Return a size that config.json states, or else the embedding shows; None where neither has one number."""
        width = text_part(self.config).get(field)
        if width is None:
            embedding = self.view.find(find_embedding(self.view.names()) or "")
            if embedding is not None and len(embedding.shape) == 2:
                width = dict(zip(EMBEDDING_FIELDS, embedding.shape, strict=True)).get(field)
        return width if isinstance(width, int) else None


def say_architectures(first: Model, other: Model) -> str:
    """Return that two models are of different architectures, if their configs say so; empty otherwise."""
    types = [model.config.get("model_type") for model in (first, other)]
    if not all(isinstance(each, str) for each in types) or types[0] == types[1]:
        return ""
    one, two = (f"{model.ref} is {kind!s:.40}" for model, kind in zip((first, other), types, strict=True))
    return f"{one}, {two} (model_type in config.json): merge models of one architecture."


@dataclass(frozen=True, slots=True)
class Input:
    """One input of an output tensor."""

    view: View
    name: str
    """The tensor's name in the view, which filters see."""
    settings: tuple[Settings, ...] = ()
    """Parameters given under this model, highest precedence first."""


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output, before its sources are looked up and its parameters resolved."""

    name: str
    position: float
    """Place of its layer on a gradient, from 0 to 1."""
    inputs: tuple[Input, ...]
    """In config order, at least one."""
    scope: Scope


class Form(ABC):
    """One way to write a merge, declared by a file in this folder and a line in its `__init__`.

    Planning calls `list_tensors`, `make_config` for the output's config.json, and `explain_unused` for every stored
    tensor that no output tensor has come to use.
    """

    moves_layers = False
    """Whether layers are numbered anew, so that per-layer fields of config.json follow them."""

    def __init__(self, config: MergeConfig, models: Mapping[ModelRef, Model]) -> None:
        """Look at a merge.

        Args:
            config: the merge.
            models: every model that it names, the donor first.
        """
        self.config = config
        self.models = dict(models)
        self.donor = next(iter(models.values()))
        self.warnings: list[str] = []
        self.notes: list[str] = []

    @staticmethod
    @abstractmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether a config is written in this form."""

    @abstractmethod
    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield every output tensor.

        Raises:
            TensorMismatchError: the models do not fit together.
            ConfigError: the config asks for what a model does not have.
        """

    def find(self, model: ModelRef, name: str) -> Source | None:
        """Return a tensor of one of the models, as it is seen here."""
        return self.models[model].view.find(name)

    def make_config(self, config: Json) -> Json:
        """Return the output's config.json, from a copy of the donor's that may be changed in place."""
        return config

    @abstractmethod
    def explain_unused(self, model: Model, name: str) -> str:
        """Return the rule by which a stored tensor is not in the output."""

    def make_scope(self, base: ModelRef | None, settings: tuple[Settings, ...]) -> Scope:
        """Return the scope that all sources of a tensor share.

        Args:
            base: the base model that holds there.
            settings: parameters that go before those of the whole merge, highest precedence first.
        """
        out_dtype = self.config.out_dtype or self.config.dtype
        return Scope(
            self.config.op,
            base,
            (*settings, self.config.parameters),
            out_dtype,
            self.config.keep_float32,
            self.config.integers,
            self.donor.ref,
            {ref: model.statistics for ref, model in self.models.items() if model.statistics is not None},
        )

    def share_head(self, first: Collection[ModelRef], last: Collection[ModelRef]) -> None:
        """Decide whether the output's head is its embedding, and have tied models looked at accordingly.

        Args:
            first: the models that give the embedding.
            last: the models that give the head.
        """
        involved = [self.models[ref] for ref in dict.fromkeys((*first, *last))]
        head: str | None = None
        if not (all(model.is_tied for model in involved) and set(first) == set(last)):
            stored = (find_head(model.view.names()) for model in involved)
            embedding = find_embedding(involved[0].view.names()) if involved[0].is_tied else None
            new = name_head(embedding, self.donor.config.get("model_type")) if embedding else None
            head = next((name for name in stored if name), new)
            if head is None:
                return
        for model in involved:
            if model.is_tied:
                self.models[model.ref] = replace(model, view=TiedView(model.view, head))
