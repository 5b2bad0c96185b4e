"""`slices`: layers of models, stacked anew."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.checkpoint.modules import common_prefix
from raymerge.pipeline.checkpoint.names import Layers, layer_position, split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.views.tying import is_head
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.config.merge_config import MergeConfig, OutputSlice, SliceSource
from raymerge.pipeline.config.values import Settings
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor
from raymerge.pipeline.plan.forms.layer_kinds import check_layers, group_layers
from raymerge.pipeline.plan.forms.stacked_config import set_no_prediction_layers, stack_layers
from raymerge.pipeline.plan.sources.resolve import Scope

_EMBEDDING_SIDE = (
    "embed", "wte", "wpe", "visual", "vision", "projector", "audio", "connector", "merger", "conv", "patch", "pre_lay",
    "norm_pre", "ln_pre",
)  # fmt: skip
"""Words in names of tensors that come before the layers; what is neither here nor in a stack comes after them."""


class Slices(Form):
    """Slices of layers; what stands before them comes from the first slice, what follows from the last."""

    moves_layers = True

    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        """Tell whether there are slices."""
        return bool(config.slices)

    def list_tensors(self) -> Iterator[OutputTensor]:
        """Yield the tensors before the layers, the layers, and the tensors after them."""
        slices = self.config.slices
        for number, part in enumerate(slices):
            self._check_ranges(part, number)
            self._check_repeats(part, number)
        involved = dict.fromkeys(source.model for part in slices for source in part.sources)
        first, last = ([source.model for source in part.sources] for part in (slices[0], slices[-1]))
        self._check_stackable([self.models[ref] for ref in involved], [self.models[ref] for ref in (*first, *last)])
        self.share_head(first, last)
        layers = {ref: group_layers(self.models[ref]) for ref in involved}
        yield from self._list_outside(slices[0], after=False)
        out_layer = 0
        for part in slices:
            scope = self._scope(part)
            num_layers = self._count(part)
            for k in range(num_layers):
                yield from self._list_layer(part, k, scope, layer_position(k, num_layers), out_layer, layers)
                out_layer += 1
        yield from self._list_outside(slices[-1], after=True)

    def make_config(self, config: Json) -> Json:
        """Have the fields that speak of layers follow the new stack."""
        layers = self.donor.layers
        if layers.stacks[layers.main] > layers.num_layers:
            set_no_prediction_layers(config)
        origins = [
            (self.models[part.sources[0].model], layer)
            for part in self.config.slices
            for layer in range(*self._span(part.sources[0]))
        ]
        config, warnings = stack_layers(config, [(model.config, layer) for model, layer in origins])
        self.warnings += [*warnings, *check_layers(config, self.donor, origins)]
        return config

    def explain_unused(self, model: Model, name: str) -> str:
        """Return which rule of stacking leaves a tensor out."""
        split = split_name(name)
        if split is not None and split.stack == model.layers.main:
            if split.layer >= model.layers.num_layers:
                return "layers past the model's own, for multi-token prediction; slices stack the model's own layers"
            return "layers in no slice"
        return "embeddings come from the first slice's models, final norm and head from the last slice's"

    def list_spans(self) -> list[tuple[int, int]]:
        """Return the layers of each slice's first source, half-open."""
        return [self._span(part.sources[0]) for part in self.config.slices]

    def _scope(self, part: OutputSlice) -> Scope:
        return self.make_scope(part.base_model or self.config.base_model, (part.parameters,))

    def _list_layer(
        self,
        part: OutputSlice,
        k: int,
        scope: Scope,
        position: float,
        out_layer: int,
        layers: Mapping[ModelRef, Mapping[int, Sequence[str]]],
    ) -> Iterator[OutputTensor]:
        """Yield the tensors of output layer `out_layer`, the k-th of a slice."""
        rests: dict[str, None] = {}
        prefixes: list[tuple[View, str, tuple[Settings, ...]]] = []
        for source in part.sources:
            model, layer = self.models[source.model], self._span(source)[0] + k
            prefixes.append((model.view, f"{model.layers.main}{layer}.", _settings_of(part, source.model)))
            rests.update(dict.fromkeys(layers[source.model].get(layer, ())))
        for rest in rests:
            inputs = tuple(Input(view, prefix + rest, settings) for view, prefix, settings in prefixes)
            yield OutputTensor(f"{self.donor.layers.main}{out_layer}.{rest}", position, inputs, scope)

    def _list_outside(self, part: OutputSlice, *, after: bool) -> Iterator[OutputTensor]:
        """Yield the tensors before or after the main stack; both lie at 0 on gradients, as in mergekit."""
        scope = self._scope(part)
        models = [self.models[source.model] for source in part.sources]
        around = len(common_prefix(self.donor.view.names()))  # a vision tower says in all of its names that it is one
        names = dict.fromkeys(
            name
            for model in models
            for name in model.view.names()
            if _is_outside(name, model.layers, around, after=after)
        )
        for name in names:
            inputs = tuple(Input(model.view, name, _settings_of(part, model.ref)) for model in models)
            yield OutputTensor(name, 0.0, inputs, scope)

    def _check_stackable(self, models: Sequence[Model], outer: Sequence[Model]) -> None:
        """Refuse models that do not go into one stack: where a tensor has one source, no shapes are compared.

        Args:
            models: all that give layers.
            outer: those that give embeddings, final norm and head.

        Raises:
            TensorMismatchError: a model differs from the donor, whose config.json the output gets.
        """
        donor = self.donor
        outer = [] if self.config.vocabulary else outer  # rows are those of one vocabulary
        for field, involved in (("hidden_size", models), ("intermediate_size", models), ("vocab_size", outer)):
            expected = donor.width(field)
            for model in involved:
                found = model.width(field)
                if found is not None and expected is not None and found != expected:
                    raise TensorMismatchError(
                        f"{field} is {expected} in {donor.ref} and {found} in {model.ref}; "
                        f"their layers do not go into one model"
                    )
        for model in models:
            if model.layers.main != donor.layers.main:
                raise TensorMismatchError(
                    f"layers are called {donor.layers.main}* in {donor.ref} and {model.layers.main}* in {model.ref}; "
                    f"give both models the same names first: load and save them with one version of transformers"
                )

    def _check_repeats(self, part: OutputSlice, number: int) -> None:
        """Warn of parameters that do not count, because the model is listed before."""
        for model in dict.fromkeys(source.model for source in part.sources):
            first, *others = _settings_of(part, model)
            if any(other != first for other in others):
                self.warnings.append(
                    f"slices[{number}]: {model} is listed more than once, with different parameters; "
                    f"the first one's hold for all, as in mergekit"
                )

    def _check_ranges(self, part: OutputSlice, number: int) -> None:
        for position, source in enumerate(part.sources):
            num_layers = self.models[source.model].layers.num_layers
            start, stop = self._span(source)
            where = f"slices[{number}].sources[{position}].layer_range"
            if stop > num_layers:
                raise ConfigError(
                    f"{where}: {[start, stop]} reaches past {source.model}, which has {counted(num_layers, 'layer')}"
                )
            if stop - start != self._count(part):
                raise ConfigError(
                    f"{where}: {[start, stop]} of {source.model} is {counted(stop - start, 'layer')}, but the first"
                    f" source of this slice, {part.sources[0].model}, gives {self._count(part)}; give all sources of a"
                    " slice the same length"
                )

    def _span(self, source: SliceSource) -> tuple[int, int]:
        """Return the layers of a source, half-open."""
        return source.layer_range or (0, self.models[source.model].layers.num_layers)

    def _count(self, part: OutputSlice) -> int:
        start, stop = self._span(part.sources[0])
        return stop - start


def _settings_of(part: OutputSlice, model: ModelRef) -> tuple[Settings, ...]:
    """Return a model's own parameters in a slice; if it is listed twice, the first go before, as in mergekit."""
    return tuple(source.parameters for source in part.sources if source.model == model)


def _is_outside(name: str, layers: Layers, around: int, *, after: bool) -> bool:
    """Tell whether a tensor stands before (or after) the main stack of layers.

    Args:
        name: of the tensor.
        layers: of its model.
        around: length of what all names begin with.
        after: whether to tell it of what stands after.
    """
    if is_head(name):
        return after
    split = split_name(name)
    if split is not None and split.stack == layers.main:
        return False
    in_other_stack = split is not None and split.stack in layers.stacks
    before = in_other_stack or any(word in name[around:] for word in _EMBEDDING_SIDE)
    return before != after
