"""`modules`: each module of the models by itself, whole or as slices of its own layers."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.model_config import Json, compare_configs, count_layers
from raymerge.pipeline.checkpoint.modules import (
    AUDIO,
    PROJECTOR,
    ROLES,
    TEXT,
    VISION,
    Module,
    Modules,
    common_prefix,
    find_modules,
)
from raymerge.pipeline.checkpoint.names import find_layers, natural_key
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.views.tying import find_embedding
from raymerge.pipeline.checkpoint.views.view import ModuleView
from raymerge.pipeline.config.merge_config import MergeConfig, ModulePart
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.messages import counted, find_near, listing
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor
from raymerge.pipeline.plan.forms.models import WholeModels
from raymerge.pipeline.plan.forms.module_config import find_section
from raymerge.pipeline.plan.forms.slices import Slices

_SHOWN = 6
_TAKEN_OUT = "deepstack_visual_indexes"
_CHOSEN_LAYERS = ("vision_feature_layer", "mm_vision_select_layer", "select_layer")
"""Fields for the layer whose output is what a vision tower gives."""
_BESIDE_TEXT = frozenset((VISION, AUDIO, PROJECTOR))
"""Roles that no name of a whole language model stands for."""
_LANGUAGE_MODEL = "text_decoder"
"""The module whose layers the top-level `slices` stack where the rest is copied."""


@dataclass(frozen=True, slots=True)
class _Opened:
    """A module of the config with the form that merges it."""

    part: ModulePart
    module: Module
    form: Form


class ModuleByModule(Form):
    """The modules that the config names, each merged by a form of its own; the donor gives the others."""

    def __init__(self, config: MergeConfig, models: Mapping[ModelRef, Model]) -> None:
        """Open each module; see `Form`.

        Raises:
            ConfigError: the donor has no such module, or a model that is to be merged there has nothing of it.
        """
        super().__init__(config, models)
        self._known = find_modules(self.donor.view.names(), self.donor.layers)
        parts = config.modules or (_wrap_slices(config),)
        chosen = [_choose(self._known, part, self.donor) for part in parts]
        self._check_distinct(parts, chosen)
        self._chosen = chosen
        self._opened = [self._open(part, module) for part, module in zip(parts, chosen, strict=True)]
        self.moves_layers = any(each.form.moves_layers for each in self._opened)

    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether modules are named, or the layers of one are stacked while the rest is copied."""
        return bool(config.modules) or bool(config.slices and config.copy_rest_from)

    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield the tensors of each module, and those of the donor that are in none of them."""
        for each in self._opened:
            try:
                yield from each.form.list_tensors()
            except (ConfigError, TensorMismatchError) as error:
                raise type(error)(f"{each.part.place}: {error}") from None
            self.warnings += [f"{each.part.name}: {warning}" for warning in each.form.warnings]
            each.form.warnings = []
            called = "" if each.module.path == each.part.name else f" ({each.part.name})"
            self.notes.append(f"{each.module.path or 'the whole model'}{called}: {_describe(each.form)}")
            self.notes += [f"{each.part.name}: {note}" for note in each.form.notes]
        rest = [name for name in self.donor.view.names() if self._find(name) is None]
        scope = replace(self.make_scope(None, ()), op=find_op("passthrough"), settings=())
        for name in sorted(rest, key=natural_key):
            yield OutputTensor(name, 0.0, (Input(self.donor.view, name),), scope)
        if rest:
            groups = [[name for name in rest if module.match(name)] for module in self._known.found]
            texts = [f"{_name_group(names)} ({counted(len(names), 'tensor')})" for names in groups if names]
            self.notes.append(f"not named in the config, so copied from {self.donor.ref}: {listing(texts, _SHOWN)}")

    def find(self, model: ModelRef, name: str) -> Source | None:
        """Return a tensor as the form of its module sees it."""
        opened = self._find(name)
        return super().find(model, name) if opened is None else opened.form.find(model, name)

    def make_config(self, config: Json) -> Json:
        """Have what is said of each module's layers follow them."""
        for each in self._opened:
            section = find_section(config, each.module.role)
            if section is not None:
                before = section.read(config)
                after = each.form.make_config(copy.deepcopy(before))
                _check_mergers(each.part, before, after)
                config = section.write(config, after)
                self.warnings += [f"{each.part.name}: {warning}" for warning in each.form.warnings]
            chosen = [key for key in _CHOSEN_LAYERS if config.get(key) is not None]
            if each.module.role == VISION and each.form.moves_layers and chosen:
                self.warnings.append(
                    f"{each.part.name}: config.json: {chosen[0]} = {config[chosen[0]]} chooses a layer of the vision"
                    " tower by its number and stays as it is; check it against the new stack"
                )
        return config

    def explain_unused(self, model: Model, name: str) -> str:
        """Return which module leaves a tensor out, and by which rule."""
        opened = self._find(name)
        if opened is None:
            return f"the config does not name its module, which is copied from {self.donor.ref}"
        seen = opened.form.models.get(model.ref)
        merged = list(_list_models(opened.form.config))
        if seen is None or model.ref not in merged:
            return f"{opened.part.name} is made of {listing(merged)}"
        return seen.view.hidden().get(name) or opened.form.explain_unused(seen, name)

    def _find(self, name: str) -> _Opened | None:
        """Return the module of the config that a tensor lies in: of several, the innermost."""
        return max(self._opened, key=lambda each: each.module.match(name)) if self._find_module(name) else None

    def _find_module(self, name: str) -> Module | None:
        found = max(self._chosen, key=lambda module: module.match(name))
        return found if found.match(name) else None

    def _open(self, part: ModulePart, module: Module) -> _Opened:
        """Return a module with the form that merges it."""
        base, op, parameters = self.config.base_model, self.config.op, part.parameters
        listed = dict.fromkeys(_list_models(part))
        models = {}
        for model in dict.fromkeys((self.donor.ref, *((base,) if base else ()), *listed)):
            seen = self._look(self.models[model], module)
            if seen.view.names():
                models[model] = seen
        for model in listed:
            if model not in models:
                raise ConfigError(
                    f"{part.place}: {model} has no tensors of this module ({module.path} in {self.donor.ref}); list"
                    " models that have it, or leave the module out, so that it is copied"
                )
        is_copied = part.is_copied
        if base is not None and base not in models:
            if len(listed) > 1 or part.slices:
                raise ConfigError(
                    f"{part.place}: base_model {base} has no tensors of this module ({module.path} in"
                    f" {self.donor.ref}), and {op.name} merges it with {listing(listed)}; give the module one model,"
                    " whose tensors are copied, or leave it out"
                )
            is_copied = True
        entries = part.models
        if is_copied:
            base, op, parameters = None, find_op("passthrough"), {}
            entries = tuple(replace(entry, parameters={}) for entry in entries)
        config = replace(
            self.config,
            op=op,
            base_model=base,
            models=entries,
            slices=part.slices,
            modules=(),
            parameters=parameters,
            copy_rest_from=self.donor.ref if entries else None,
        )
        if part.slices and find_section(self.donor.config, module.role) is None:
            raise ConfigError(
                f"{part.place}: config.json of {self.donor.ref} counts no layers of this module ({module.path}), so its"
                " layers cannot be stacked anew; write `models`"
            )
        self._compare(part, module, list(models.values()))
        return _Opened(part, module, Slices(config, models) if part.slices else WholeModels(config, models))

    def _look(self, model: Model, module: Module) -> Model:
        """Return a model as if it were nothing but one of its modules."""
        view = ModuleView(model.view, lambda name: self._find_module(name) is module)
        section = find_section(model.config, module.role)
        config = {} if section is None else section.read(model.config)
        sizes = ((name, source.nbytes) for name in view.names() if (source := view.find(name)))
        layers = find_layers(sizes, count_layers(config))
        is_tied = model.is_tied and find_embedding(view.names()) is not None
        return replace(model, view=view, config=config, layers=layers, is_tied=is_tied)

    def _compare(self, part: ModulePart, module: Module, models: list[Model]) -> None:
        """Warn of fields that give the weights of a module another meaning; a language model's are compared before."""
        if module.role != TEXT and models[0].config:
            configs = [(model.ref, model.config) for model in models if model.config]
            self.warnings += [f"{part.name}: {warning}" for warning in compare_configs(configs)]

    def _check_distinct(self, parts: tuple[ModulePart, ...], chosen: list[Module]) -> None:
        """Refuse two names for one module."""
        for k, module in enumerate(chosen):
            same = next((number for number in range(k) if chosen[number] == module), None)
            if same is not None:
                raise ConfigError(
                    f"{parts[k].place}: stands for {module.path} in {self.donor.ref}, and so does {parts[same].place};"
                    " keep one of them"
                )


def settle_modules(config: MergeConfig, models: Mapping[ModelRef, Model]) -> MergeConfig:
    """Return a config whose donor has all modules that are named, or that merges whole models if there are no modules.

    Args:
        config: the merge.
        models: every model that it names.
    """
    if not config.modules:
        return config
    known = {ref: find_modules(models[ref].view.names(), models[ref].layers) for ref in config.referenced_models}
    donor, *others = known
    (first, *more) = config.modules
    if known[donor].is_one and all(each.is_one for each in known.values()) and not more:
        is_beside_text = not _BESIDE_TEXT.isdisjoint(ROLES.get(first.name, ()))
        if is_beside_text and known[donor].choose(first.name) is None:
            raise _explain_missing(known[donor], first, models[donor])
        note = f"{first.place}: {donor} has no modules, so {first.name} stands for the whole model"
        return replace(
            config,
            models=first.models,
            slices=first.slices,
            parameters=first.parameters,
            modules=(),
            notes=(*config.notes, note),
        )
    names = [part.name for part in config.modules]
    if config.copy_rest_from is not None or all(known[donor].choose(name) for name in names):
        return config
    for other in others:
        if all(known[other].choose(name) for name in names):
            lacking = [name for name in names if known[donor].choose(name) is None]
            note = (
                f"{donor} has no {listing(lacking)}, so {other}, the first model that has, gives config.json, tokenizer"
                " and whatever is not merged; `copy_rest_from` names another one"
            )
            return replace(config, copy_rest_from=other, notes=(*config.notes, note))
    return config


def _choose(known: Modules, part: ModulePart, donor: Model) -> Module:
    """Return the donor's module that a part of the config stands for.

    Raises:
        ConfigError: there is none.
    """
    module = known.choose(part.name)
    if module is None:
        raise _explain_missing(known, part, donor)
    return module


def _explain_missing(known: Modules, part: ModulePart, donor: Model) -> ConfigError:
    """Return the error for a part of the config whose module the donor does not have."""
    near = find_near(part.name, known.list_names())
    question = f"; did you mean {near!r}?" if near else ""
    there = f"it has {known.describe()}" if not known.is_one else "it is one module, called `default`"
    return ConfigError(f"{part.place}: {donor.ref} has no module of this name; {there}{question}")


def _check_mergers(part: ModulePart, before: Json, after: Json) -> None:
    """Refuse vision layers that Qwen3-VL takes out of the tower for mergers, where their number changes."""
    old, new = (config.get(_TAKEN_OUT) for config in (before, after))
    if isinstance(old, list) and isinstance(new, list) and len(old) != len(new):
        raise ConfigError(
            f"{part.place}: {_TAKEN_OUT} of config.json is {old}, each with a merger of its own, and of these layers"
            f" the slices keep {len(new)}; choose ranges that have each of them once"
        )


def _name_group(names: Sequence[str]) -> str:
    """Return what the names of tensors have in common."""
    return common_prefix(names).removesuffix(".") or listing(names, 1)


def _wrap_slices(config: MergeConfig) -> ModulePart:
    """Return slices of the whole merge as those of the language model."""
    return ModulePart(_LANGUAGE_MODEL, (), config.slices, config.parameters, is_copied=False, place="slices")


def _list_models(part: ModulePart | MergeConfig) -> Iterator[ModelRef]:
    entries = part.entries if isinstance(part, MergeConfig) else part.models
    yield from (entry.model for entry in entries)
    yield from (source.model for each in part.slices for source in each.sources)


def _describe(form: Form) -> str:
    config = form.config
    models = list(dict.fromkeys(_list_models(config)))
    if config.op.name == "passthrough" and not config.parameters and not config.slices:
        return f"copied from {listing(models)}"
    num_layers = sum(stop - start for start, stop in form.list_spans()) if isinstance(form, Slices) else 0
    stacked = f", {counted(num_layers, 'layer')}" if num_layers else ""
    return f"{config.op.name} of {listing(models)}{stacked}"
