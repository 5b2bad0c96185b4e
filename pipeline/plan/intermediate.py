"""Documents that others use: their outputs, presented as models that are merged on demand and never stored."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from raymerge.ops.intermediate import Intermediate, cover
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.gathered_rows import GatheredRows
from raymerge.pipeline.checkpoint.model_config import count_layers
from raymerge.pipeline.checkpoint.names import find_layers
from raymerge.pipeline.checkpoint.quantised import Quantisation
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.checkpoint.tying import is_tied
from raymerge.pipeline.checkpoint.views import View
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.forms.modules import settle_modules
from raymerge.pipeline.plan.recipe import Recipe, expand
from raymerge.pipeline.plan.resolve import COPY
from raymerge.pipeline.plan.tokenizers import PlannedVocabulary, finish_config, plan_vocabulary
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.files import ByteRange, aligned
from raymerge.pipeline.stores.open import Stores


@dataclass(frozen=True, slots=True)
class MergedTensor(Source):
    """A tensor of a document's output, merged from its own sources when it is decoded."""

    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    merge: TensorMerge = field(repr=False)
    """The merge that makes it."""

    @property
    def decoder(self) -> Intermediate:
        """Decoder that merges."""
        (variant,) = self.merge.variants
        dtype = DTYPES[self.merge.written_dtype].torch_name
        return Intermediate(variant.kernel, self.merge.site(variant), self.merge.sources, dtype)

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        """The stored tensors of all sources."""
        return tuple(dict.fromkeys(tensor for source in self.merge.sources for tensor in source.origins))

    @property
    def identity(self) -> Identity:
        """The merge, and its sources."""
        (variant,) = self.merge.variants
        sources: Identity = [source.identity for source in self.merge.sources]
        return ["merge", self.merge.name, self.merge.op, repr(variant.parameters), variant.seed, self.dtype, sources]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        """Return what the sources need for the whole blocks that hold the elements, source by source."""
        first, last = cover(start, stop, self.decoder.grid, self.num_elements)
        return tuple(piece for source in self.merge.sources for piece in source.ranges(first, last))

    @property
    def fixed_nbytes(self) -> int:
        """Return that of the sources."""
        return sum(source.fixed_nbytes for source in self.merge.sources)

    def max_nbytes(self, num_elements: int) -> int:
        """Return the room of the whole blocks that hold so many elements, wherever they begin."""
        grid = self.decoder.grid
        most = min(self.num_elements, (-(-num_elements // grid) + 1) * grid)
        return sum(source.max_nbytes(most) for source in self.merge.sources)

    def decoded_nbytes(self, num_elements: int) -> int:
        """Return the room for the values, and for those that loops make of the sources."""
        own = aligned(num_elements * DTYPES[self.merge.written_dtype].num_bits // 8)
        return own + sum(source.decoded_nbytes(num_elements) for source in self.merge.sources)


class MergedView(View):
    """A document's output."""

    def __init__(self, ref: ModelRef, merges: Sequence[TensorMerge]) -> None:
        self.ref = ref
        self._sources = {merge.name: _make_source(str(ref), merge) for merge in merges}

    def names(self) -> Collection[str]:
        """Return the names of the output's tensors."""
        return self._sources.keys()

    def find(self, name: str) -> Source | None:
        """Return a tensor of the output."""
        return self._sources.get(name)


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The inputs of the last document: stored models, and outputs of the other documents."""

    checkpoints: tuple[Checkpoint, ...]
    """Models, the donor first; another document's output has the files of its own donor."""
    models: tuple[Model, ...]
    """The same models, opened."""
    config: MergeConfig
    """The last document, with its modules settled."""
    warnings: tuple[str, ...] = ()
    """Warnings about the other documents; each begins with a document's name."""
    dropped: tuple[str, ...] = ()
    """Tensors that are in none of their outputs; each line begins with a document's name."""


def expand_steps(
    stores: Stores,
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    models: Sequence[Model],
    seed: int,
    allowed_mem: int,
) -> MergeInputs:
    """Plan the documents that a config uses, and return the inputs of the last one.

    Args:
        stores: of the inputs.
        config: the last document.
        checkpoints: the stored models.
        models: the same models, opened.
        seed: of all merges.
        allowed_mem: of the merge, in bytes.

    Raises:
        ConfigError: another document uses an output for which that is not supported.
        RaymergeError: as for `expand`.
    """
    files = {checkpoint.model: checkpoint for checkpoint in checkpoints}
    known = {model.ref: model for model in models}
    warnings: list[str] = []
    dropped: list[str] = []
    for document in config.steps:
        _check_usable(document)
        step = settle_modules(document, known)
        refs = step.referenced_models
        opened = [known[ref] for ref in refs]
        planned = plan_vocabulary(stores, step, [files[ref] for ref in refs], opened, allowed_mem)
        recipe = expand(step, opened, seed, planned.vocabulary if planned else None)
        ref = ModelRef(step.name or "")
        warnings += [f"{ref}: {warning}" for warning in recipe.warnings]
        if planned is not None:
            _check_tokens(step, planned, recipe)
            warnings += [f"{ref}: {warning}" for warning in finish_config(planned, recipe.config)]
        if step.chat_template is not None:
            warnings.append(
                f"{ref}: chat_template: not in the output, because others use this document; write it in the last"
            )
        dropped += [f"{ref}: {line}" for line in recipe.dropped]
        files[ref] = replace(files[refs[0]], model=ref, config=recipe.config, warnings=())
        known[ref] = _open(ref, recipe)
    config = settle_modules(config, known)
    refs = config.referenced_models
    if config.mixture and refs[0] not in {model.ref for model in models}:
        raise ConfigError(
            f"base_model: the routers of a mixture of experts are made from a model that is stored, and {refs[0]} is a"
            " document; merge that by itself first, and name its directory here"
        )
    inputs = tuple(files[ref] for ref in refs), tuple(known[ref] for ref in refs)
    return MergeInputs(*inputs, config, tuple(warnings), tuple(dropped))


def list_sources(merge: TensorMerge) -> Iterator[Source]:
    """Yield the sources of a merge, each before the sources that it is merged from itself."""
    for source in merge.sources:
        yield source
        if isinstance(source, MergedTensor):
            yield from list_sources(source.merge)


def check_rows(merges: Iterable[TensorMerge]) -> None:
    """Refuse outputs of documents whose rows would be put in another order.

    Raises:
        ConfigError: there are some.
    """
    for merge in merges:
        for source in merge.sources:
            parts = source.parts if isinstance(source, GatheredRows) else ()
            if merged := next((part for part in parts if isinstance(part, MergedTensor)), None):
                raise ConfigError(
                    f"{merged.model}: the tokenizer that is asked for has other rows than this document's output, which"
                    " is not supported yet; if its models have the same tokens, and rows beyond these, give it the same"
                    " `tokenizer`; otherwise merge it by itself first, and name its directory in the last document"
                )


def _check_usable(step: MergeConfig) -> None:
    """Refuse a document whose output is more than merged tensors, and is to be used by others."""
    beyond = {
        f"{step.op.name} takes statistics of models": step.statistics,
        "a mixture of experts is made": step.mixture,
    }
    for what, is_so in beyond.items():
        if is_so:
            raise ConfigError(
                f"{step.name}: {what}, and other documents use the output, which is not supported yet; merge this"
                " document by itself first, and name its directory in the others"
            )


def _check_tokens(step: MergeConfig, planned: PlannedVocabulary, recipe: Recipe) -> None:
    """Refuse a document whose tokenizer or rows are not those of its first model, but for rows beyond the tokens."""
    has_other_rows = any(isinstance(source, GatheredRows) for merge in recipe.merges for source in merge.sources)
    if has_other_rows or planned.vocabulary.tokens.is_changed or not planned.is_donor:
        assert step.vocabulary is not None
        where, first = step.vocabulary.path, step.referenced_models[0]
        raise ConfigError(
            f"{step.name}: {where} gives tokens or rows that {first} does not have, or"
            " not in this order, and other documents use the output, which is not supported yet; merge this document by"
            " itself first, and name its directory in the others"
        )


def _open(ref: ModelRef, recipe: Recipe) -> Model:
    names = [merge.name for merge in recipe.merges]
    layers = find_layers(((merge.name, merge.nbytes) for merge in recipe.merges), count_layers(recipe.config))
    view = MergedView(ref, recipe.merges)
    return Model(view, recipe.config, layers, is_tied(recipe.config, names), tuple(names), Quantisation())


def _make_source(model: str, merge: TensorMerge) -> Source:
    """Return an output tensor as a source: the stored tensor itself where it is only copied."""
    first = merge.sources[0]
    if merge.op == COPY and isinstance(first, StoredTensor):
        return replace(first, dtype=merge.out_dtype, shape=merge.shape)
    return MergedTensor(model, merge.name, merge.out_dtype, merge.shape, merge)
