"""Reads `models` and `slices`, of a whole config or of one of its modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.fields import check_empty, parse_layer_range
from raymerge.pipeline.config.forms import WHOLE, check_lengths
from raymerge.pipeline.config.merge_config import ModelEntry, OutputSlice, SliceSource
from raymerge.pipeline.config.methods import (
    Use,
    check_method_of_slice,
    check_models,
    check_sources,
    lacks_all_weights,
    parse_settings,
    takes_first_as_base,
)
from raymerge.pipeline.config.node import Place, PlaceError
from raymerge.pipeline.config.reference import NO_MODEL, parse_model_ref, parse_revision, spelling_key
from raymerge.pipeline.config.sections.training_run import RUN_KEYS, FindModels, parse_run
from raymerge.pipeline.config.values import Settings, overlay
from raymerge.pipeline.messages import shown


@dataclass(frozen=True, slots=True)
class Body:
    """The body of a merge, or of one of its modules."""

    place: Place
    """Node that has `models` or `slices`."""
    models: tuple[ModelEntry, ...]
    slices: tuple[OutputSlice | None, ...]
    """None for those that could not be read."""
    parameters: Settings
    """Parameters of the body, and below them those of the whole merge."""
    is_copied: bool
    """Whether the only model of a module is copied, because the method has nothing to merge it with."""


class BodyReader:
    """Reads bodies, and goes on after a mistake, which is noted, as far as the rest makes sense without it."""

    def __init__(self, root: Place, ops: Mapping[str, Op], find: FindModels | None) -> None:
        self.names = frozenset(parameter.name for op in ops.values() for parameter in op.parameters)
        """Names of all parameters of all ops."""
        self.op: Op | None = None
        self.base: ModelRef | None = None
        self.mentions: dict[ModelRef, Place] = {}
        """First node that names each model."""
        self.uses: list[Use] = []
        """Places that use per-model parameters."""
        self.statistics: dict[ModelRef, ModelRef] = {}
        """References of the statistics of each model."""
        self.statistics_places: dict[ModelRef, Place] = {}
        """First node that names each of them."""
        self._root = root
        self._around: tuple[Place, ...] = (root,)
        """Nodes that may have parameters for all models of the body, the nearest first."""
        self._ops = ops
        self._find = find
        self._spellings: dict[tuple[object, ...], ModelRef] = {}
        """Models by what all spellings of their names have in common."""
        self._parameters: Settings = {}

    def read_body(self, body: Place, name: str, parameters: Settings) -> Body:
        """Return what is merged in a body.

        Args:
            body: where `models` or `slices` stand.
            name: of the module, or `WHOLE`.
            parameters: of the whole merge.
        """
        self._around, self._parameters = (self._root,), parameters
        if body is not self._root:
            self._around = (body, self._root)
            self._parameters = overlay(self.read_parameters(body, of_model=False), parameters)
        models, is_copied = self._read_models(body, name)
        slices = [place.attempt(self._read_slice) for place in body.get("slices").attempt(_list) or ()]
        if slices:
            check_empty(body.get("slices"), [part.sources[0].layer_range if part else None for part in slices])
        return Body(body, tuple(models), tuple(slices), self._parameters, is_copied)

    def read_base(self, place: Place) -> ModelRef | None:
        """Return the base model that is named at a place; None where none is, or none can be meant."""
        base = place.get("base_model")
        return None if base.value is None else base.attempt(self.parse_model)

    def parse_model(self, place: Place, beside: Place | None = None) -> ModelRef:
        """Return the model named at a place, by the name that the config has for it elsewhere.

        Args:
            place: where it is named.
            beside: where its revision may be, if there is such a place.
        """
        model = parse_model_ref(place)
        if beside is not None:
            model = parse_revision(beside, model)
        known = self._spellings.setdefault(spelling_key(model), model)
        self.mentions.setdefault(known, place)
        if known != model:
            place.warn(f"{model} is {known}, spelt in another way; both count as one model, and as two in mergekit")
        return known

    def read_parameters(self, place: Place, *, of_model: bool) -> Settings:
        """Return the parameters that are given at a place, under a model or for all of them."""
        written = place.get("parameters")
        if self.op is None:
            return {}
        return written.attempt(partial(parse_settings, op=self.op, ops=self._ops, of_model=of_model)) or {}

    def _read_models(self, body: Place, name: str) -> tuple[list[ModelEntry], bool]:
        """Return the models of a body, and whether the only one of a module is copied."""
        place = body.get("models")
        entries: dict[ModelRef, ModelEntry] = {}
        num_errors, num_uses = len(place.findings.errors), len(self.uses)
        if isinstance(place.value, dict) and not RUN_KEYS.isdisjoint(place.value):
            entries |= place.attempt(self._read_run) or {}
        else:
            for written in place.attempt(_list) or ():
                entry = written.attempt(partial(self._read_entry, before=entries))
                if entry is not None:
                    entries[entry.model] = entry
        if not entries or self.op is None or len(place.findings.errors) > num_errors or not self._is_base_sound():
            return list(entries.values()), False
        if self.base is None and takes_first_as_base(self.op):
            self.base = self._take_first(next(iter(entries)))
        if name != WHOLE and len(entries) == 1:  # whether the base has this module is known when it is opened
            is_copied = self._is_left_alone(place, self.op, next(iter(entries)), self.uses[num_uses:])
            del self.uses[num_uses:]
            return list(entries.values()), is_copied
        check = partial(check_models, place=place, op=self.op, models=tuple(entries), base=self.base)
        self._root.attempt(check)
        return list(entries.values()), False

    def _is_left_alone(self, place: Place, op: Op, model: ModelRef, uses: Sequence[Use]) -> bool:
        """Tell whether a method has nothing to do where one model is all that there is."""
        if lacks_all_weights(op, uses) or (model == self.base and op.base is not Base.INPUT):
            return True
        try:
            check_models(self._root, place, op, [model], self.base)
        except PlaceError:
            return True
        return False

    def _read_run(self, place: Place) -> dict[ModelRef, ModelEntry]:
        entries = {}
        for model, parameters in parse_run(place, self.op, self._parameters, self._find, self.base):
            self._check_parameters(place, model, (parameters, self._parameters), self.base)
            entries[model] = ModelEntry(model, parameters)
        return entries

    def _read_entry(self, place: Place, before: Mapping[ModelRef, ModelEntry]) -> ModelEntry | None:
        self._check_entry(place, ("model", "revision", "parameters", *self._list_statistics()))
        model, parameters = self._read_model(place), self.read_parameters(place, of_model=True)
        if model is None:
            return None
        self._read_statistics(place, model)
        if model in before:
            same = list(before).index(model)
            raise place.get("model").error(
                f"{model} is listed already, as models[{same}]; list each model once, with all of its weight"
            )
        self._check_parameters(place, model, (parameters, self._parameters), self.base)
        return ModelEntry(model, parameters)

    def _read_model(self, place: Place) -> ModelRef | None:
        written = place.get("model")
        if written.value is None:
            place.note(place.missing("model", NO_MODEL))
            return None
        return written.attempt(partial(self.parse_model, beside=place.get("revision")))

    def _take_first(self, model: ModelRef) -> ModelRef:
        """Note that the first model is the base, for want of another, and return it."""
        self._root.findings.notes.append(f"base_model is not given, so the first model, {model}, is the base (t = 0)")
        return model

    def _list_statistics(self) -> tuple[str, ...]:
        """Return the key for a model's statistics, if the method takes any."""
        return (self.op.statistics.key,) if self.op and self.op.statistics else ()

    def _read_statistics(self, place: Place, model: ModelRef) -> None:
        for key in self._list_statistics():
            written = place.get(key)
            found = None if written.value is None else written.attempt(parse_model_ref)
            if found is not None:
                self.statistics_places.setdefault(found, written)
            if found is not None and self.statistics.setdefault(model, found) != found:
                before = self.statistics[model]
                written.note(written.error(f"{found} is given for {model}, and {before} before; give it once"))

    def _is_base_sound(self) -> bool:
        return self.base is not None or self._root.get("base_model").value is None

    def _check_parameters(
        self, place: Place, model: ModelRef, levels: tuple[Settings, ...], base: ModelRef | None, *around: Place
    ) -> None:
        """Warn about parameters of a base that takes none; note what others need."""
        op = self.op
        if op is None:
            return
        if model != base or op.base is Base.INPUT:
            self.uses.append(Use((place, *around, *self._around), levels, model))
        elif levels[0]:
            place.get("parameters").warn(
                f"ignored ({', '.join(levels[0])}), because {model} is the base, and {op.name} takes none for the base"
            )

    def _read_slice(self, place: Place) -> OutputSlice | None:
        self._check_entry(place, ("sources", "base_model", "merge_method", "residual_weight", "parameters"))
        if self.op is not None:
            check_method_of_slice(place, self.op)
        if place.get("residual_weight").value is not None:
            place.get("residual_weight").warn("has no effect, in mergekit neither; remove it")
        written = place.get("sources")
        if not written:
            problem = "no sources are given; list at least one `- model: ...` with its layer_range"
            raise place.missing("sources", problem)
        own_base = self.read_base(place)
        if own_base and self.op and self.op.base is Base.INPUT:
            place.get("base_model").warn(f"has no effect, because {self.op.name} takes no base; remove it")
        base = own_base or self.base
        parameters = self.read_parameters(place, of_model=False)
        num_errors = len(place.findings.errors)
        read = partial(self._read_source, around=place, parameters=parameters, base=base)
        sources = [source.attempt(read) for source in written.elements()]
        found = tuple(source for source in sources if source is not None)
        if len(place.findings.errors) > num_errors:
            return None
        check_lengths(written, found)
        if base is None and self.op is not None and takes_first_as_base(self.op) and self._is_base_sound():
            base = own_base = self._take_first(found[0].model)
        if self.op is not None and self._is_base_sound():
            check_sources(self._root, written, self.op, [source.model for source in found], base)
        return OutputSlice(found, own_base, parameters)

    def _read_source(
        self, place: Place, around: Place, parameters: Settings, base: ModelRef | None
    ) -> SliceSource | None:
        self._check_entry(place, ("model", "revision", "layer_range", "parameters", *self._list_statistics()))
        model, own = self._read_model(place), self.read_parameters(place, of_model=True)
        if model is not None:
            self._read_statistics(place, model)
            self._check_parameters(place, model, (own, parameters, self._parameters), base, around)
        layer_range = parse_layer_range(place.get("layer_range"), place.misspelt("layer_range"))
        return None if model is None else SliceSource(model, layer_range, own)

    def _check_entry(self, place: Place, keys: tuple[str, ...]) -> None:
        """Check that an entry of a list is a mapping with these keys."""
        if isinstance(place.value, str):
            raise place.error(f"{shown(place.value)} is given, a mapping is needed; write `- {keys[0]}: {place.value}`")
        if place.value is None:
            raise place.error(f"the entry is empty; write `- {keys[0]}: ...`")
        place.check_keys(keys, self.names)


def _list(place: Place) -> list[Place]:
    return list(place.elements()) if place else []
