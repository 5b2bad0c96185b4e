"""Adapters merged among each other: from their updates to the tensors and the config of one adapter."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from raymerge.ops.kernels.linear import LinearCombination
from raymerge.ops.registry import Base
from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.checkpoint.adapters.source import UpdatedTensor
from raymerge.pipeline.checkpoint.adapters.updates import APPLY, ModuleUpdate, read_updates
from raymerge.pipeline.checkpoint.adapters.written import PREFIX, dump_adapter_config, name_factors, name_whole
from raymerge.pipeline.checkpoint.names import Layers, natural_key, split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import ScaledTensor, Source, StoredTensor, ZeroTensor
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.sections.adapter import AdapterRule
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.adapters.checks import check_updates
from raymerge.pipeline.plan.adapters.factor_pair import FactorPair
from raymerge.pipeline.plan.sources.adapted import find_coefficients
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.sources.resolve import Part, Scope, make_tensor_merge, promote
from raymerge.pipeline.plan.types import TensorMerge, Variant

_WHOLE_TOLERANCE = 1e-6
"""Weights of whole tensors that add up to one but for this share leave nothing of the base."""
_SHOWN = 4


@dataclass(frozen=True, slots=True)
class AdapterRecipe:
    """Every tensor of the adapter that is made, and what else follows from the inputs."""

    merges: tuple[TensorMerge, ...]
    """In natural order of names."""
    config: str
    """The text of adapter_config.json."""
    warnings: tuple[str, ...]
    notes: tuple[str, ...]


def expand_adapters(config: MergeConfig, adapters: Mapping[ModelRef, Adapter], seed: int) -> AdapterRecipe:
    """Work out every tensor of the adapter that a config makes of others.

    Args:
        config: whose models are all adapters.
        adapters: each of them.
        seed: of the merge.

    Raises:
        TensorMismatchError: adapters do not fit each other, or what they store whole cannot be merged.
        CheckpointError: an update depends on the weights that it is added to.
        ConfigError: a parameter is missing.
        OpParameterError: the op refuses the parameters.
    """
    return _Expansion(config, adapters, seed).expand()


class _Expansion:
    def __init__(self, config: MergeConfig, adapters: Mapping[ModelRef, Adapter], seed: int) -> None:
        self._config = config
        self._rule = config.adapter or AdapterRule()
        self._seed = seed
        self._each = [read_updates(adapters[entry.model]) for entry in config.models]
        self._warnings = check_updates(self._each)
        self._scope = Scope(
            config.op,
            config.base_model,
            (config.parameters,),
            config.out_dtype or config.dtype,
            config.keep_float32,
        )
        self._modules = sorted({module for each in self._each for module in each.modules}, key=natural_key)
        self._layers = _find_layers(self._modules)
        self._ranks: dict[str, int] = {}

    def expand(self) -> AdapterRecipe:
        merges: list[TensorMerge] = []
        has_biases = False
        for module in self._modules:
            found = {each.ref: each.modules[module] for each in self._each if module in each.modules}
            merges += self._merge_factors(module, found) if self._rule.by_factors else [self._merge(module, found)]
            if any(update.bias for update in found.values()):
                has_biases = True
                merges.append(self._merge_bias(module, found))
        whole = sorted({name for each in self._each for name in each.whole}, key=natural_key)
        merges += [self._merge_whole(name) for name in whole]
        first = self._each[0].adapter.config
        tasks = {each.adapter.config.task for each in self._each}
        text = dump_adapter_config(
            next((each.adapter.config.base for each in self._each if each.adapter.config.base), ""),
            self._ranks,
            whole,
            is_turned=first.is_transposed,
            task=first.task if len(tasks) == 1 else None,
            has_biases=has_biases,
        )
        ordered = sorted(merges, key=lambda merge: natural_key(merge.name))
        return AdapterRecipe(tuple(ordered), text, tuple(self._warnings), tuple(self._describe(whole)))

    def _merge(self, module: str, found: Mapping[ModelRef, ModuleUpdate]) -> TensorMerge:
        """Return the merge of a module's updates, into factors."""
        first = next(iter(found.values()))
        rows, columns = first.shape
        name, dtype = f"{module}.weight", _find_dtype(found.values())
        zero = ZeroTensor("", name, dtype, first.shape)

        def make(ref: ModelRef) -> Source | None:
            if ref not in found:
                return None
            return UpdatedTensor(str(ref), name, dtype, first.shape, zero, rows, 1, (found[ref].as_term(),))

        merge = self._resolve(name, dtype, first.shape, make)
        (variant,) = merge.variants
        coefficients = find_coefficients(variant.kernel)
        full: Source
        if coefficients is None:
            full = MergedTensor("", name, "F32", first.shape, replace(merge, out_dtype="F32", written_dtype="F32"))
            rank = min(self._rule.rank or max(update.rank for update in found.values()), rows, columns)
        else:
            factors = dict(zip((each.ref for each in self._each), coefficients, strict=True))
            terms = [update.as_term(factors[ref]) for ref, update in found.items() if factors[ref]]
            terms = terms or [first.as_term(0.0)]
            full = UpdatedTensor("", name, dtype, first.shape, zero, rows, 1, tuple(terms))
            least = min(sum(update.term.rank for update in terms), rows, columns)
            rank = min(self._rule.rank or least, least)
        self._ranks[module] = rank
        of_a, of_b = name_factors(module, is_embedding=first.is_embedding)
        outputs, inputs, _ = first.layout
        shape = (rank * (rows + columns),)
        pair = FactorPair("", module, merge.out_dtype, shape, full, rank)
        return TensorMerge(
            f"{PREFIX}{module}",
            shape,
            merge.out_dtype,
            merge.out_dtype,
            merge.op,
            (pair,),
            (Variant(variant.parameters, LinearCombination((1.0,)), self._seed),),
            packed=((of_a, (rank, *inputs)), (of_b, (outputs[0], rank, *outputs[1:]))),
        )

    def _merge_factors(self, module: str, found: Mapping[ModelRef, ModuleUpdate]) -> list[TensorMerge]:
        """Return the merges of both factors of a module, each by itself, with the roots of scales and weights."""
        first, *others = found.items()
        for ref, update in others:
            if update.rank != first[1].rank:
                raise TensorMismatchError(
                    f"{module} has rank {first[1].rank} in {first[0]} and {update.rank} in {ref}, and factors are"
                    " merged element by element; leave `merge: factors` out, and their products are merged"
                )
        self._ranks[module] = first[1].rank
        names = name_factors(module, is_embedding=first[1].is_embedding)
        dtype = _find_dtype(found.values())
        merges = []
        for name, is_a in zip(names, (True, False), strict=True):
            scaled = {ref: _scale_root(ref, update, is_a=is_a) for ref, update in found.items()}
            merges.append(self._merge_factor(name, dtype, scaled, is_a=is_a))
        return merges

    def _merge_factor(self, name: str, dtype: str, found: Mapping[ModelRef, Source], *, is_a: bool) -> TensorMerge:
        merge = self._resolve(name, dtype, next(iter(found.values())).shape, found.get)
        (variant,) = merge.variants
        parameters = dict(variant.parameters)
        weights = parameters.get("weight")
        if isinstance(weights, tuple):
            roots = tuple(_find_root(float(weight), is_signed=is_a) for weight in weights)
            kernel = self._config.op.kernel({**parameters, "weight": roots})
            merge = replace(merge, variants=(replace(variant, kernel=kernel),))
        return merge

    def _merge_bias(self, module: str, found: Mapping[ModelRef, ModuleUpdate]) -> TensorMerge:
        """Return the merge of what updates add to a module's bias."""
        biases: dict[ModelRef, Source] = {}
        for ref, update in found.items():
            if (bias := update.bias) is not None:
                biases[ref] = ScaledTensor(str(ref), bias.name, bias.dtype, bias.shape, bias, update.scale)
        first = next(iter(biases.values()))
        name = name_factors(module, is_embedding=False)[1].replace(".weight", ".bias")
        return self._resolve(name, promote([bias.dtype for bias in biases.values()]), first.shape, biases.get)

    def _merge_whole(self, name: str) -> TensorMerge:
        """Return the weighted sum of a tensor that adapters store whole; what updates are added to has to be equal.

        Raises:
            TensorMismatchError: the method is no weighted sum, the weights leave something of the base, or one adapter
                stores whole what another has an update of.
        """
        found = {each.ref: each.whole[name] for each in self._each if name in each.whole}
        shapes = {source.shape: ref for ref, source in found.items()}
        if len(shapes) > 1:
            told = " and ".join(f"{list(shape)} in {ref}" for shape, ref in shapes.items())
            raise TensorMismatchError(f"{name}, which adapters store whole, is {told}; {APPLY}")
        first = next(iter(found.values()))
        stored = name_whole(name, self._modules)
        if stored.endswith(".base_layer.weight"):
            self._check_is_base(name, found)
            parts = [Part(ref, name, source.as_bytes(), ()) for ref, source in found.items()]
            copied = make_tensor_merge(stored, parts, self._scope, 0.0, self._seed)
            return replace(copied, shape=first.shape, out_dtype=first.dtype)
        merge = self._resolve(name, promote([s.dtype for s in found.values()]), first.shape, found.get)
        (variant,) = merge.variants
        coefficients = find_coefficients(variant.kernel)
        factors = dict(zip((each.ref for each in self._each), coefficients or (), strict=coefficients is not None))
        total = sum(factors.get(ref, math.nan) for ref in found)
        if not abs(total - 1) <= _WHOLE_TOLERANCE:
            why = (
                f"with weights that add up to {total:g}, the rest is the base's"
                if coefficients
                else f"{self._config.op.name} needs what it changes in the base's"
            )
            raise TensorMismatchError(
                f"{name} is stored whole in {listing(found)} (modules_to_save, bias), and {why}, which no adapter"
                f" holds; take linear with weights that add up to 1, or {APPLY}"
            )
        kernel = LinearCombination(tuple(factors[ref] for ref in found))
        variants = (replace(variant, kernel=kernel),)
        return replace(merge, name=stored, sources=tuple(found.values()), variants=variants)

    def _check_is_base(self, name: str, found: Iterable[ModelRef]) -> None:
        """Refuse a tensor that was trained as a whole (modules_to_save) in place of the base's that updates go with."""
        module = name.rpartition(".")[0]
        updating = [each for each in self._each if module in each.modules]
        if not any(name in each.whole for each in updating):
            raise TensorMismatchError(
                f"{name} is stored whole in {listing(found)} (modules_to_save), and {updating[0].ref} has an update of"
                f" the base's, which no adapter holds; {APPLY}"
            )

    def _resolve(
        self, name: str, dtype: str, shape: tuple[int, ...], find: Callable[[ModelRef], Source | None]
    ) -> TensorMerge:
        """Return the merge of one tensor of all adapters; those that lack it have zeros in its place."""
        parts = [
            Part(
                entry.model,
                name,
                find(entry.model) or ZeroTensor(str(entry.model), name, dtype, shape),
                (entry.parameters,),
            )
            for entry in self._config.models
        ]
        if self._config.op.base is Base.REQUIRED and (base := self._config.base_model) is not None:
            parts.append(Part(base, name, ZeroTensor(str(base), name, dtype, shape), ()))
        return make_tensor_merge(name, parts, self._scope, self._layers.position(name), self._seed)

    def _describe(self, whole: Sequence[str]) -> Iterable[str]:
        counts = Counter(self._ranks.values()).most_common()
        ranks = listing([f"rank {rank} for {number:,}" for rank, number in counts], _SHOWN)
        also = f", and stores {counted(len(whole), 'tensor')} whole" if whole else ""
        yield f"the adapter changes {counted(len(self._ranks), 'module')}: {ranks}{also}"
        levels = [self._config.parameters, *(entry.parameters for entry in self._config.models)]
        if any(len(rule.values) > 1 for level in levels for setting in level.values() for rule in setting.rules):
            spans = [f"{stack}0 to {number - 1}" for stack, number in self._layers.stacks.items()]
            yield f"gradients run over the layers up to the last that an adapter changes: {listing(spans, _SHOWN)}"


def _find_layers(modules: Iterable[str]) -> Layers:
    """Return stacks of layers that end with the last one that is changed: how many a model has, no adapter says."""
    stacks: dict[str, int] = {}
    for split in filter(None, (split_name(f"{module}.weight") for module in modules)):
        stacks[split.stack] = max(stacks.get(split.stack, 0), split.layer + 1)
    return Layers(stacks, "", 0)


def _find_dtype(updates: Iterable[ModuleUpdate]) -> str:
    return promote([factor.dtype for update in updates for factor in (update.a, update.b)])


def _scale_root(ref: ModelRef, update: ModuleUpdate, *, is_a: bool) -> Source:
    """Return a factor times the root of its update's scale, whose sign `a` gets."""
    stored: StoredTensor = update.a if is_a else update.b
    root = _find_root(update.scale, is_signed=is_a)
    return ScaledTensor(str(ref), stored.name, stored.dtype, stored.shape, stored, root)


def _find_root(value: float, *, is_signed: bool) -> float:
    """Return the root of a number's size, with the number's sign if that is wanted."""
    return math.copysign(math.sqrt(abs(value)), value if is_signed else 1)
