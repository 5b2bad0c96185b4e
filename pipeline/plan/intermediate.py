"""Documents that others use: their outputs, presented as models that are merged on demand and never stored."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import CONFIG
from raymerge.pipeline.checkpoint.model_config import count_layers, dump_config
from raymerge.pipeline.checkpoint.names import find_layers
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import TokenizerReader
from raymerge.pipeline.checkpoint.views.quantised import Quantisation
from raymerge.pipeline.checkpoint.views.tying import is_tied
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.plan.directory import Directory, finish_directory, gather_files
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.forms.gates import MakeGates, RouterBase, make_gates
from raymerge.pipeline.plan.forms.modules import settle_modules
from raymerge.pipeline.plan.out_files import Copied, Written
from raymerge.pipeline.plan.recipe import Recipe, expand
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.sources.resolve import COPY
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.plan.vocabulary.tokenizers import finish_config, plan_vocabulary
from raymerge.pipeline.stores.open import Stores


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
class Planning:
    """Options and services that every document is planned with."""

    stores: Stores
    """Stores of the inputs."""
    seed: int
    """Seed of all merges."""
    allowed_mem: int
    """Memory for the merge, in bytes."""
    reader: TokenizerReader
    measures: bool
    """Whether what takes a pass through a model is computed."""


@dataclass(frozen=True, slots=True)
class MergeInputs:
    """The inputs of one document: stored models, and outputs of other documents."""

    checkpoints: tuple[Checkpoint, ...]
    """Models, the donor first; an output of a document has the files that it would have if it were stored."""
    models: tuple[Model, ...]
    """The same models, opened."""
    config: MergeConfig
    """The document, with its modules settled."""
    others: tuple[Checkpoint, ...] = ()
    """All outputs of documents before this one."""
    warnings: tuple[str, ...] = ()
    """Warnings about the other documents; each begins with a document's name."""
    notes: tuple[str, ...] = ()
    """Likewise."""
    dropped: tuple[str, ...] = ()
    """Tensors and files that are in none of their outputs; each line begins with a document's name."""

    def open_gates(self, planning: Planning, config: MergeConfig) -> MakeGates | None:
        """Return what makes the weights of routers; None for a document that makes no mixture."""
        if config.mixture is None:
            return None
        model = self.models[0]
        base = RouterBase(self.checkpoints[0], model.view, model.layers, model.width("hidden_size") or 0)
        make = partial(make_gates, planning.stores, config.mixture, base, planning.seed, planning.allowed_mem)
        return cache(partial(make, measures=planning.measures))


def expand_steps(
    planning: Planning,
    config: MergeConfig,
    checkpoints: Sequence[Checkpoint],
    models: Sequence[Model],
    statistics: Mapping[ModelRef, View],
) -> MergeInputs:
    """Plan the documents that a config uses, and return the inputs of the last one.

    Args:
        planning: what all are planned with.
        config: the last document.
        checkpoints: the stored models of all documents, or one component of each.
        models: the same models, opened.
        statistics: of models, by the config's names for them.

    Raises:
        RaymergeError: as for `expand`, and for the files of an output.
    """
    files = {checkpoint.model: checkpoint for checkpoint in checkpoints}
    known = {model.ref: model for model in models}
    outputs: dict[ModelRef, Checkpoint] = {}
    warnings, notes, dropped = list[str](), list[str](), list[str]()
    for document in config.steps:
        inputs = _find_inputs(document, files, known, outputs, statistics)
        step = inputs.config
        planned = plan_vocabulary(
            planning.stores, step, inputs.checkpoints, inputs.models, planning.reader, inputs.others
        )
        gates = inputs.open_gates(planning, step)
        recipe = expand(step, inputs.models, planning.seed, planned.vocabulary if planned else None, gates)
        more = finish_config(planned, recipe.config) if planned else []
        ref = ModelRef(step.name or "")
        known[ref] = _open(ref, recipe)
        gathered = finished = Directory(())
        donor = inputs.checkpoints[0]
        files[ref] = replace(donor, model=ref, config=recipe.config, warnings=())
        if not donor.prefix:  # what is beside the components of a pipeline is the donor's
            gathered = gather_files(planning.stores, step, inputs.checkpoints, planned, planning.allowed_mem)
            written = [Written(CONFIG, dump_config(recipe.config))]
            finished = finish_directory(planning.stores, step, inputs.checkpoints, planned, gathered, written)
            files[ref] = outputs[ref] = _keep_files(planning.stores, ref, recipe, finished)
        found = (*gathered.warnings, *more, *finished.warnings, *recipe.warnings)
        warnings += [f"{ref}: {warning}" for warning in found]
        said = (*recipe.notes, *finished.notes, *((gates().note,) if gates else ()))
        notes += [f"{ref}: {note}" for note in filter(None, said)]
        dropped += [f"{ref}: {line}" for line in (*recipe.dropped, *gathered.left_out)]
    inputs = _find_inputs(config, files, known, outputs, statistics)
    return replace(inputs, warnings=tuple(warnings), notes=tuple(notes), dropped=tuple(dropped))


def _find_inputs(
    config: MergeConfig,
    files: Mapping[ModelRef, Checkpoint],
    known: Mapping[ModelRef, Model],
    outputs: Mapping[ModelRef, Checkpoint],
    statistics: Mapping[ModelRef, View],
) -> MergeInputs:
    """Return the inputs of a document, each with the statistics that it names for it."""
    config = settle_modules(config, known)
    refs = config.referenced_models
    places = [config.statistics.get(ref) for ref in refs]
    models = [
        replace(known[ref], statistics=statistics[place] if place else None)
        for ref, place in zip(refs, places, strict=True)
    ]
    return MergeInputs(tuple(files[ref] for ref in refs), tuple(models), config, tuple(outputs.values()))


def _keep_files(stores: Stores, ref: ModelRef, recipe: Recipe, directory: Directory) -> Checkpoint:
    """Return a document's output as a checkpoint: its files are where they are copied from, or kept in memory."""
    url = f"inline://{ref.path}"
    files = {
        file.name: file.source if isinstance(file, Copied) else stores.put(url, file.name, file.text.encode())
        for file in directory.files
    }
    return Checkpoint(ref, url, recipe.config, (), dict(sorted(files.items())))


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
