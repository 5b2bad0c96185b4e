"""A mergekit config: what to merge, how, and with which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Op
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.sections.adapter import AdapterRule
from raymerge.pipeline.config.sections.chat_template import TemplateChoice
from raymerge.pipeline.config.sections.tokenizer import VocabularyRule
from raymerge.pipeline.config.values import Settings

RANDOM_GATES = ("random", "uniform_random")
"""Modes in which the routers of a mixture are random."""


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of `models`: a whole model."""

    model: ModelRef
    parameters: Settings
    """Written under this model: per-model parameters only."""


@dataclass(frozen=True, slots=True)
class SliceSource:
    """One entry of a slice's `sources`: some layers of a model."""

    model: ModelRef
    layer_range: tuple[int, int] | None
    """Half-open: [start, stop); None for all layers of the model."""
    parameters: Settings
    """Written under this source: per-model parameters only."""


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """One entry of `slices`: consecutive layers of the output."""

    sources: tuple[SliceSource, ...]
    """At least one; all of the same number of layers, which may be 0 in the first slice and the last."""
    base_model: ModelRef | None
    """Holds for this slice instead of the config's; None where the slice has none of its own."""
    parameters: Settings


@dataclass(frozen=True, slots=True)
class ModulePart:
    """One entry of `modules`: what is merged in one module of the models, such as a vision tower."""

    name: str
    """As written: mergekit's name for the module, or the checkpoint's."""
    models: tuple[ModelEntry, ...]
    slices: tuple[OutputSlice, ...]
    """Slices of the module's own layers; either these or `models` are there."""
    parameters: Settings
    """Parameters of the module, and below them those of the whole merge."""
    is_copied: bool
    """Whether its only model is copied, because the method has nothing to merge it with."""
    place: str
    """Its place in the YAML, for messages."""


@dataclass(frozen=True, slots=True)
class Expert:
    """A model whose MLPs become one expert in each layer."""

    model: ModelRef
    positive_prompts: tuple[str, ...]
    """Texts that are to choose it."""
    negative_prompts: tuple[str, ...]
    """Texts that are not."""
    residual_scale: float
    """Factor of what it adds to the residual stream: of its down projections."""
    noise_scale: float
    """Standard deviation of the noise that is added to its weights; 0 for none."""


@dataclass(frozen=True, slots=True)
class Mixture:
    """A mixture of experts: its models, and what its routers are made of."""

    gate_mode: str
    """Origin of the routers: `hidden_last`, `hidden_avg`, `cheap_embed`, `random` or `uniform_random`."""
    experts: tuple[Expert, ...]
    """At least one."""
    shared_experts: tuple[Expert, ...]
    """Experts that every token passes through."""
    experts_per_token: int
    architecture: str
    """The beginning of the name of what it becomes; empty where the models decide."""

    @property
    def needs_prompts(self) -> bool:
        """Whether routers are made of prompts, and not of random numbers."""
        return self.gate_mode not in RANDOM_GATES

    @property
    def needs_hidden_states(self) -> bool:
        """Whether routers take a pass through the base."""
        return self.gate_mode.startswith("hidden")

    @property
    def models(self) -> tuple[ModelRef, ...]:
        """Every expert's model, in the order of the file."""
        return tuple(expert.model for expert in (*self.experts, *self.shared_experts))


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A merge as the YAML asks for it; exactly one of `models`, `slices`, `modules` and `mixture` is there."""

    op: Op
    """The merge method."""
    models: tuple[ModelEntry, ...]
    """As listed; see `entries`."""
    slices: tuple[OutputSlice, ...]
    base_model: ModelRef | None
    dtype: str | None
    """As in a safetensors header; None where the inputs decide."""
    out_dtype: str | None
    """Likewise; goes before `dtype` in the output."""
    keep_float32: tuple[str, ...]
    """Shell patterns of names: those stored as float32 stay that, whatever `dtype` says."""
    integers: str
    """Tensors that are not floating-point: `equal` in all models, or the `donor`'s, the `max` or the `sum`."""
    parameters: Settings
    """At the top level, for the whole merge."""
    text: str
    """The YAML as given."""
    warnings: tuple[str, ...]
    """Probable mistakes; each begins with its YAML path."""
    notes: tuple[str, ...] = ()
    """Notes on the reading of the config where it leaves something open."""
    name: str | None = None
    """Name by which other documents use its output."""
    chat_template: TemplateChoice | None = None
    """The chat template of the output; None where it gets the donor's."""
    steps: tuple[MergeConfig, ...] = ()
    """The other documents that this one uses, by whatever way, each before those that use it."""
    own: OwnOps | None = None
    """The file that declares the method, where it is of the user's own."""
    is_run: bool = False
    """Whether the models were found by a pattern."""
    statistics: Mapping[ModelRef, ModelRef] = field(default_factory=dict)
    """References of the statistics of each model that the method takes besides."""
    statistics_lines: Mapping[ModelRef, str] = field(default_factory=dict, compare=False)
    """The first place in the YAML of each of these references, with file and line, for messages."""
    vocabulary: VocabularyRule | None = None
    """The tokenizer of the output; None where it gets the donor's, and rows are merged by their numbers."""
    mixture: Mixture | None = None
    """The mixture of experts that is made."""
    adapter: AdapterRule | None = None
    """The adapter that is made of adapters; None where the config says nothing of one."""
    modules: tuple[ModulePart, ...] = ()
    """Modules that the config names, of models with several."""
    copy_rest_from: ModelRef | None = None
    """The model that gives config.json, tokenizer, names, and every tensor that none of the merged models has."""

    @property
    def method(self) -> str:
        """The merge method's name."""
        return self.op.name

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """The effective entries: those of `models`, and last a base model that is not among them."""
        listed = any(entry.model == self.base_model for entry in self.models)
        if not self.models or self.base_model is None or listed:
            return self.models
        return (*self.models, ModelEntry(self.base_model, {}))

    @property
    def referenced_models(self) -> tuple[ModelRef, ...]:
        """Every model once: the one that the rest is copied from, the base, then in the order of the file."""
        first = (model for model in (self.copy_rest_from, self.base_model) if model)
        found = dict.fromkeys(first)
        bodies: tuple[MergeConfig | ModulePart, ...] = (self, *self.modules)
        for body in bodies:
            found |= dict.fromkeys(entry.model for entry in body.models)
            found |= dict.fromkeys(source.model for part in body.slices for source in part.sources)
        return tuple(found | dict.fromkeys(self.mixture.models if self.mixture else ()))

    @property
    def statistics_places(self) -> dict[ModelRef, str]:
        """References of statistics of models, those of other documents included, and where the YAML names them."""
        configs = (*self.steps, self)
        refs = dict.fromkeys(place for config in configs for place in config.statistics.values())
        lines = {ref: line for config in reversed(configs) for ref, line in config.statistics_lines.items()}
        return {ref: lines.get(ref, "") for ref in refs}

    @property
    def needs_measures(self) -> bool:
        """Whether routers of a mixture take a pass through a model, or through a tensor of another document."""
        mixtures = [config.mixture for config in (*self.steps, self) if config.mixture]
        return any(each.needs_hidden_states or (each.needs_prompts and bool(self.steps)) for each in mixtures)

    @property
    def input_models(self) -> tuple[ModelRef, ...]:
        """Every model that is read, once: in the place of another document's output, what that is made of."""
        outputs = {ModelRef(step.name): step for step in self.steps if step.name}
        found: dict[ModelRef, None] = {}
        giver = self.vocabulary.source if self.vocabulary else None
        tokenizers = (giver,) if isinstance(giver, ModelRef) and giver in outputs else ()
        for model in (*self.referenced_models, *tokenizers):
            step = outputs.get(model)
            found |= dict.fromkeys([model] if step is None else replace(step, steps=self.steps).input_models)
        return tuple(found)
