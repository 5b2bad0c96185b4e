"""From a config and what the checkpoints hold to one recipe for each output tensor."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raymerge.ops.registry import Base, find_op
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.model_config import (
    Json,
    compare_configs,
    count_layers,
    set_dtype,
    set_no_prediction_layers,
    set_tied,
    stack_layers,
    text_part,
)
from raymerge.pipeline.checkpoint.names import Layers, find_layers, layer_position, natural_key, split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.tying import find_embedding, find_head, is_tied, name_head
from raymerge.pipeline.config.merge_config import MergeConfig, OutputSlice
from raymerge.pipeline.config.values import Settings
from raymerge.pipeline.errors import CheckpointError, ConfigError, TensorMismatchError
from raymerge.pipeline.plan.accounts import Accounts, count_tensors
from raymerge.pipeline.plan.resolve import Part, Scope, make_tensor_merge
from raymerge.pipeline.plan.types import ParameterValue, TensorMerge

_EMBEDDING_SIDE = ("embed", "wte", "wpe", "visual", "vision", "projector", "audio", "connector", "merger")
"""Words in names of tensors that come before the layers; what is neither here nor in a stack comes after them."""

_EMBEDDING_FIELDS = ("vocab_size", "hidden_size")
"""What config.json calls the rows and columns of an embedding."""
_CAUSAL_MASKS = (".attn.bias", ".attention.bias")
"""Names of buffers of shape [1, 1, n, n]; in any other shape, such a tensor is a weight."""
_OPTIONAL_BUFFERS = (".masked_bias", ".position_ids", *_CAUSAL_MASKS)


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every output tensor, and what else follows from the inputs."""

    merges: tuple[TensorMerge, ...]
    """In natural order of names."""
    config: Json
    """The output's config.json."""
    warnings: tuple[str, ...]
    dropped: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Model:
    """One input as the recipe sees it."""

    ref: ModelRef
    config: Json
    tensors: Mapping[str, StoredTensor]
    layers: Layers
    tied: bool

    def find(self, name: str, head: str | None) -> StoredTensor | None:
        """Return the tensor of this name; for the head of a tied model, its embedding."""
        if name == head and self.tied:
            name = find_embedding(self.tensors) or name
        return self.tensors.get(name)

    def group_layers(self) -> Mapping[int, Sequence[str]]:
        """Return what the tensors of each layer of the main stack are called, without the stack and the number."""
        rests: dict[int, list[str]] = {}
        for name in self.tensors:
            split = split_name(name)
            if split is not None and split.stack == self.layers.main:
                rests.setdefault(split.layer, []).append(split.rest)
        return rests

    def width(self, field: str) -> int | None:
        """Return a size that config.json states, or else the embedding shows; None where neither has one number."""
        width = text_part(self.config).get(field)
        if width is None:
            embedding = self.tensors.get(find_embedding(self.tensors) or "")
            if embedding is not None and len(embedding.shape) == 2:
                width = dict(zip(_EMBEDDING_FIELDS, embedding.shape, strict=True)).get(field)
        return width if isinstance(width, int) else None


def expand(
    config: MergeConfig, checkpoints: Sequence[Checkpoint], tensors: Mapping[str, Mapping[str, StoredTensor]]
) -> Recipe:
    """Work out every output tensor, and account for every input tensor.

    Args:
        config: the merge.
        checkpoints: the donor first.
        tensors: for each model, by its reference as text, its tensors by name.

    Raises:
        TensorMismatchError: a tensor is missing in a model, or does not fit the others.
        CheckpointError: a model has no tensors.
        ConfigError: a slice reaches past a model's layers, or a parameter is missing.
    """
    models = {c.model: _make_model(c, tensors.get(str(c.model), {})) for c in checkpoints}
    donor = models[checkpoints[0].model]
    builder = _Builder(config, models, donor)
    if config.slices:
        builder.add_slices(config.slices)
    else:
        builder.add_models()
    return builder.finish()


def _make_model(checkpoint: Checkpoint, tensors: Mapping[str, StoredTensor]) -> _Model:
    if not tensors:
        raise CheckpointError(f"{checkpoint.model}: the checkpoint holds no tensors")
    layers = find_layers(((t.name, t.nbytes) for t in tensors.values()), count_layers(checkpoint.config))
    return _Model(checkpoint.model, checkpoint.config, tensors, layers, is_tied(checkpoint.config, tensors))


class _Builder:
    """Collects output tensors; one method for each form of config."""

    def __init__(self, config: MergeConfig, models: Mapping[ModelRef, _Model], donor: _Model) -> None:
        self.config = config
        self.models = models
        self.donor = donor
        self.op = find_op(config.method)
        self.accounts = Accounts()
        self.rests: dict[ModelRef, Mapping[int, Sequence[str]]] = {}
        self.merges: list[TensorMerge] = []
        self.out_config = copy.deepcopy(donor.config)
        configs = [(model.ref, model.config) for model in models.values()]
        self.warnings = compare_configs(configs, is_stack=bool(config.slices))
        for model in models.values():
            stated = count_layers(model.config)
            if stated is not None and stated > model.layers.num_layers:
                self.warnings.append(
                    f"{model.ref}: config.json states {stated} layers, and the checkpoint has "
                    f"{model.layers.num_layers}; is it complete?"
                )

    def add_models(self) -> None:
        """Merge whole models: every tensor with the same name in every model."""
        entries = self.config.entries
        models = [self.models[entry.model] for entry in entries]
        self._check_depths(models)
        scope = self._scope(self.config.base_model, ())
        head = self._head(models, models)
        names = dict.fromkeys(name for model in models for name in model.tensors)
        for name in sorted({*names, *([head] if head else [])}, key=natural_key):
            sources = [(model, name, (entry.parameters,)) for model, entry in zip(models, entries, strict=True)]
            self._add(name, sources, scope, self.donor.layers.position(name), head)

    def add_slices(self, slices: Sequence[OutputSlice]) -> None:
        """Stack slices of layers; what stands before them comes from the first slice, what follows from the last."""
        for number, part in enumerate(slices):
            self._check_ranges(part, number)
            self._check_repeats(part, number)
        involved = [self.models[model] for model in dict.fromkeys(s.model for part in slices for s in part.sources)]
        first, last = ([self.models[s.model] for s in part.sources] for part in (slices[0], slices[-1]))
        self._check_stackable(involved, [*first, *last])
        self.rests = {model.ref: model.group_layers() for model in involved}
        head = self._head(first, last)
        self._add_outside(slices[0], first, head, after=False)
        origins: list[tuple[Json, int]] = []
        for part in slices:
            scope = self._scope(part.base_model or self.config.base_model, (part.parameters,))
            num_layers = part.sources[0].layer_range[1] - part.sources[0].layer_range[0]
            for k in range(num_layers):
                self._add_layer(part, k, scope, layer_position(k, num_layers), len(origins))
                origin = part.sources[0]
                origins.append((self.models[origin.model].config, origin.layer_range[0] + k))
        self._add_outside(slices[-1], last, head, after=True)
        layers = self.donor.layers
        if layers.stacks[layers.main] > layers.num_layers:
            set_no_prediction_layers(self.out_config)
        self.out_config, warnings = stack_layers(self.out_config, origins)
        self.warnings += warnings

    def finish(self) -> Recipe:
        """Return the recipe, once everything is added.

        Raises:
            TensorMismatchError: something does not fit; the message lists the first few cases.
        """
        self.accounts.check()
        if not self.merges:
            raise CheckpointError(f"{self.donor.ref}: no tensor is left for the output")
        out_has_head = find_head(merge.name for merge in self.merges) is not None
        if out_has_head and self.donor.tied:
            set_tied(self.out_config, False)
            self.warnings.append(
                f"the inputs do not share one tied embedding, so the output gets a head of its own and "
                f"tie_word_embeddings: false ({self.donor.ref} has it tied)"
            )
        elif not out_has_head and not self.donor.tied and find_head(self.donor.tensors):
            set_tied(self.out_config, True)
        nbytes_by_dtype: Counter[str] = Counter()
        for merge in self.merges:
            if DTYPES[merge.out_dtype].is_mergeable:
                nbytes_by_dtype[merge.out_dtype] += merge.nbytes
        if nbytes_by_dtype:
            set_dtype(self.out_config, DTYPES[nbytes_by_dtype.most_common(1)[0][0]].torch_name)
        wide = [merge.name for merge in self.merges if any(source.dtype == "F64" for source in merge.sources)]
        if wide:
            self.warnings.append(f"{count_tensors(wide)} stored as float64, merged in float32")
        self._warn_of_cancelling_weights()
        dropped = self.accounts.explain_dropped(
            (model.ref, model.tensors, model.layers) for model in self.models.values()
        )
        merges = tuple(sorted(self.merges, key=lambda merge: natural_key(merge.name)))
        return Recipe(merges, self.out_config, tuple(self.warnings), dropped)

    def _scope(self, base: ModelRef | None, settings: tuple[Settings, ...]) -> Scope:
        out_dtype = self.config.out_dtype or self.config.dtype
        return Scope(self.op, base, (*settings, self.config.parameters), out_dtype)

    def _head(self, first: Sequence[_Model], last: Sequence[_Model]) -> str | None:
        """Return the name of the output's head, or None if the embedding serves as head (or there is no head)."""
        involved = [*first, *last]
        if all(model.tied for model in involved) and {m.ref for m in first} == {m.ref for m in last}:
            for model in involved:
                stored = find_head(model.tensors)
                if stored:
                    self.accounts.drop(model.ref, stored, "tie_word_embeddings is true, so loaders ignore it")
            return None
        names = (find_head(model.tensors) for model in involved)
        embedding = find_embedding(involved[0].tensors) if involved[0].tied else None
        head = next((name for name in names if name), name_head(embedding) if embedding else None)
        for model in involved:
            if model.tied and head is not None and head in model.tensors:
                self.accounts.drop(
                    model.ref, head, "the model's head is tied to its embedding, which is merged instead"
                )
        return head

    def _add(
        self,
        name: str,
        sources: Sequence[tuple[_Model, str, tuple[Settings, ...]]],
        scope: Scope,
        position: float,
        head: str | None = None,
    ) -> None:
        """Add one output tensor, from the tensors of these names in these models."""
        if any(self.accounts.is_dropped(model.ref, source) for model, source, _ in sources if head is None):
            return
        found = [model.find(source, head) for model, source, _ in sources]
        rule = _find_drop_rule(name, found)
        if rule is not None:
            for model, source, _ in sources:
                self.accounts.drop(model.ref, source, rule)
            return
        parts = []
        for (model, source, settings), tensor in zip(sources, found, strict=True):
            if tensor is None:
                self.accounts.miss(source, model.ref, has=[m.ref for m, s, _ in sources if m.find(s, head)])
                continue
            self.accounts.use(model.ref, tensor.name)
            parts.append(Part(model.ref, source, tensor, settings))
        if len(parts) == len(sources):
            try:
                self.merges.append(make_tensor_merge(name, parts, scope, position))
            except TensorMismatchError as error:
                self.accounts.mismatch(str(error))

    def _add_layer(self, part: OutputSlice, k: int, scope: Scope, position: float, out_layer: int) -> None:
        """Add the tensors of output layer `out_layer`, the k-th of a slice."""
        rests: dict[str, None] = {}
        prefixes = []
        for source in part.sources:
            model = self.models[source.model]
            prefix = f"{model.layers.main}{source.layer_range[0] + k}."
            prefixes.append((model, prefix, _settings_of(part, source.model)))
            rests.update(dict.fromkeys(self.rests[source.model].get(source.layer_range[0] + k, ())))
        for rest in rests:
            name = f"{self.donor.layers.main}{out_layer}.{rest}"
            self._add(name, [(model, prefix + rest, settings) for model, prefix, settings in prefixes], scope, position)

    def _add_outside(self, part: OutputSlice, models: Sequence[_Model], head: str | None, *, after: bool) -> None:
        """Add the tensors before or after the main stack; both lie at 0 on gradients, as in mergekit."""
        scope = self._scope(part.base_model or self.config.base_model, (part.parameters,))
        names = dict.fromkeys(
            name
            for model in models
            for name in model.tensors
            if name != head and _is_outside(name, model.layers, after=after)
        )
        for name in [*names, *([head] if after and head else [])]:
            sources = [(model, name, _settings_of(part, model.ref)) for model in models]
            self._add(name, sources, scope, 0.0, head)

    def _check_depths(self, models: Sequence[_Model]) -> None:
        first = models[0]
        for model in models[1:]:
            if model.layers.num_layers != first.layers.num_layers:
                raise TensorMismatchError(
                    f"{first.ref} has {first.layers.num_layers} layers and {model.ref} has {model.layers.num_layers}; "
                    f"name the layers to merge with `slices`"
                )

    def _check_stackable(self, models: Sequence[_Model], outer: Sequence[_Model]) -> None:
        """Refuse models that do not go into one stack: where a tensor has one source, no shapes are compared.

        Args:
            models: all that give layers.
            outer: those that give embeddings, final norm and head.

        Raises:
            TensorMismatchError: a model differs from the donor, whose config.json the output gets.
        """
        donor = self.donor
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

    def _warn_of_cancelling_weights(self) -> None:
        """Warn once of weights of both signs that are divided by their sum, or by the sum of those that agree."""
        if self.op.base is not Base.REQUIRED or not {"weight", "normalize"} <= {p.name for p in self.op.parameters}:
            return
        found = [merge for merge in self.merges if _may_cancel(dict(merge.parameters))]
        if found:
            self.warnings.append(
                f"{count_tensors([merge.name for merge in found])}: normalize is true, and weights have both signs "
                f"({dict(found[0].parameters)['weight']}); where they nearly cancel, values get huge: "
                f"set normalize: false"
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
            if source.layer_range[1] > num_layers:
                raise ConfigError(
                    f"slices[{number}].sources[{position}].layer_range: {list(source.layer_range)} reaches past "
                    f"{source.model}, which has {num_layers} layers"
                )


def _settings_of(part: OutputSlice, model: ModelRef) -> tuple[Settings, ...]:
    """A model's own parameters in a slice; if it is listed twice, the first value counts for both, as in mergekit."""
    return tuple(source.parameters for source in part.sources if source.model == model)


def _find_drop_rule(name: str, found: Sequence[StoredTensor | None]) -> str | None:
    """Return why an output tensor is left out, if it is a buffer: computed by the model, not learned."""
    if name.endswith("rotary_emb.inv_freq"):
        return "a buffer that models compute when they are loaded"
    if not name.endswith(_OPTIONAL_BUFFERS) or None not in found:
        return None
    if name.endswith(_CAUSAL_MASKS) and any(tensor and tensor.shape[:2] != (1, 1) for tensor in found):
        return None
    return "a buffer that models compute when they are loaded, and that not all inputs have"


def _may_cancel(parameters: Mapping[str, ParameterValue]) -> bool:
    weights = parameters.get("weight")
    if not parameters.get("normalize") or not isinstance(weights, tuple):
        return False
    numbers = [weight for weight in weights if isinstance(weight, int | float)]
    return min(numbers, default=0) < 0 < max(numbers, default=0)


def _is_outside(name: str, layers: Layers, *, after: bool) -> bool:
    """Whether a tensor stands before (or after) the main stack of layers."""
    split = split_name(name)
    if split is not None and split.stack == layers.main:
        return False
    in_other_stack = split is not None and split.stack in layers.stacks
    before = in_other_stack or any(word in name for word in _EMBEDDING_SIDE)
    return before != after
