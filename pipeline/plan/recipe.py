"""From a config and what the checkpoints hold to every output tensor: the one path after the forms."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.checkpoint.adapters.source import ReplacedTensor
from raymerge.pipeline.checkpoint.adapters.view import AdapterView
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.model_config import Json, count_layers, text_part
from raymerge.pipeline.checkpoint.names import (
    CAUSAL_MASKS,
    COMPUTED_BUFFER,
    OPTIONAL_BUFFERS,
    find_layers,
    natural_key,
)
from raymerge.pipeline.checkpoint.source import Source, StoredTensor
from raymerge.pipeline.checkpoint.views.quantised import find_quantisation
from raymerge.pipeline.checkpoint.views.tying import find_embedding, is_head, is_tied
from raymerge.pipeline.checkpoint.views.view import StoredView
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import CheckpointError, TensorMismatchError
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.forms import open_form
from raymerge.pipeline.plan.forms.form import Form, Model, OutputTensor
from raymerge.pipeline.plan.forms.gates import MakeGates
from raymerge.pipeline.plan.out_config import check_configs, make_out_config
from raymerge.pipeline.plan.renaming import explain_names, match_names
from raymerge.pipeline.plan.sources.accounts import Accounts, count_tensors
from raymerge.pipeline.plan.sources.resolve import Part, make_tensor_merge
from raymerge.pipeline.plan.types import ParameterValue, TensorMerge
from raymerge.pipeline.plan.vocabulary.rows import Vocabulary


@dataclass(frozen=True, slots=True)
class Recipe:
    """Every output tensor, and what else follows from the inputs."""

    merges: tuple[TensorMerge, ...]
    """In natural order of names."""
    config: Json
    """The output's config.json."""
    warnings: tuple[str, ...]
    dropped: tuple[str, ...]
    notes: tuple[str, ...]
    """On tensors that the method merges in another way than the rest."""


def open_model(
    checkpoint: Checkpoint,
    tensors: Mapping[str, StoredTensor],
    *,
    has_own_head: bool = False,
    adapter: Adapter | None = None,
) -> Model:
    """Return a model as it is stored, with an adapter if there is one.

    Args:
        checkpoint: its files and config.json.
        tensors: its tensors by name.
        has_own_head: whether a stored head has other values than the embedding that it is said to be.
        adapter: applied to it.

    Raises:
        CheckpointError: it has no tensors, or is quantised and has an adapter.
        TensorMismatchError: the adapter is one for another model.
    """
    if not tensors:
        raise CheckpointError(f"{checkpoint.model}: the checkpoint holds no tensors")
    layers = find_layers(((t.name, t.nbytes) for t in tensors.values()), count_layers(checkpoint.config))
    tied = is_tied(checkpoint.config, tensors, has_own_head=has_own_head)
    quantisation = find_quantisation(checkpoint.config, checkpoint.files, tensors)
    view = StoredView(checkpoint.model, tensors)
    model = Model(view, checkpoint.config, layers, tied, tuple(tensors), quantisation)
    if adapter is None:
        return model
    _check_not_quantised(model)
    return apply_adapter(model, AdapterView(view, adapter, checkpoint.model))


def apply_adapter(model: Model, view: AdapterView) -> Model:
    """Return a model with an adapter; one whose head the adapter changes has a head of its own from then on."""
    config = model.config
    embedding = view.find(find_embedding(view.names()) or "")
    if isinstance(embedding, ReplacedTensor) and embedding.shape[0] != model.width("vocab_size"):
        config = copy.deepcopy(config)
        text_part(config)["vocab_size"] = embedding.shape[0]
    is_tied = model.is_tied and not any(is_head(name) for name in view.changed_names())
    return replace(model, view=view, config=config, is_tied=is_tied, adapter=view.summarise())


def expand(
    config: MergeConfig,
    models: Sequence[Model],
    seed: int = 0,
    vocabulary: Vocabulary | None = None,
    make_gates: MakeGates | None = None,
) -> Recipe:
    """Work out every output tensor, and account for every stored tensor.

    Args:
        config: the merge.
        models: the donor first.
        seed: of the merge.
        vocabulary: of the output, where it is not the models' own.
        make_gates: makes weights of routers, for a mixture of experts.

    Raises:
        TensorMismatchError: a tensor is missing in a model, or does not fit the others.
        CheckpointError: no tensor is left.
        ConfigError: a slice reaches past a model's layers, or a parameter is missing.
    """
    for model in models:
        _check_not_quantised(model)
        _check_gathered(model)
    models, warnings = match_names(models, takes_parts=bool(config.models or config.modules or config.copy_rest_from))
    form = open_form(config, {model.ref: model for model in models}, make_gates, seed)
    form.warnings += warnings
    return expand_form(form, models, seed, vocabulary)


def expand_form(form: Form, models: Sequence[Model], seed: int, vocabulary: Vocabulary | None = None) -> Recipe:
    """Work out every output tensor of a form; see `expand`."""
    warnings = check_configs(models, moves_layers=form.moves_layers)
    accounts = Accounts()
    found = (_resolve(form, output, accounts, seed, vocabulary) for output in form.list_tensors())
    merges = sorted(filter(None, found), key=lambda merge: natural_key(merge.name))
    accounts.check(lambda: explain_names(models))
    donor = models[0]
    if not merges:
        raise CheckpointError(f"{donor.ref}: no tensor is left for the output")
    out_config, more = make_out_config(form, merges, donor)
    warnings += [
        *form.warnings,
        *more,
        *_warn_of_float64(merges),
        *_warn_of_cancelling_weights(form.config.op, merges),
    ]
    for model in form.models.values():
        for name, rule in model.view.hidden().items():
            accounts.drop(model.ref, name, rule)
    dropped = accounts.explain_dropped(
        {model.ref: model.stored for model in models},
        lambda ref, name: form.models[ref].view.seen(name),
        lambda ref, name: form.explain_unused(form.models[ref], name),
    )
    unused, notes = _account_for_statistics(form, merges)
    return Recipe(tuple(merges), out_config, tuple(warnings), (*dropped, *unused), (*form.notes, *notes))


def _account_for_statistics(form: Form, merges: Sequence[TensorMerge]) -> tuple[list[str], tuple[str, ...]]:
    """Return a line for the statistics of each model that are not used, and one on tensors merged without any.

    Raises:
        TensorMismatchError: none are used.
    """
    wanted = form.config.op.statistics
    views = [model.statistics for model in form.models.values() if model.statistics is not None]
    if wanted is None or not views:
        return [], ()
    used = {(tensor.model, tensor.name) for merge in merges for source in merge.statistics for tensor in source.origins}
    if not used:
        raise TensorMismatchError(
            f"{views[0].ref}: none of the {wanted.title} there belongs to a tensor of the merge: they are called"
            f" {listing(views[0].names())}, and the tensors {listing([merge.name for merge in merges])}; they need the"
            " names of the tensors"
        )
    lines = []
    for view in dict.fromkeys(views):
        unused = [name for name in view.names() if (str(view.ref), name) not in used]
        if unused:
            lines.append(f"{view.ref}: {count_tensors(unused)}: {wanted.title} of no tensor that is merged by them")
    without = [merge.name for merge in merges if merge.op == form.config.op.name and not merge.num_statistics]
    return lines, (f"{count_tensors(without)} merged without {wanted.title}, for there are none",) if without else ()


def _check_not_quantised(model: Model) -> None:
    """Refuse packed numbers that no view makes values of."""
    packed = (tensor.name for tensor in model.quantisation.packed)
    why = model.quantisation.explain([name for name in packed if not isinstance(model.view.find(name), StoredTensor)])
    if why:
        raise CheckpointError(f"{model.ref}: {why}")


def _check_gathered(model: Model) -> None:
    """Refuse what a trainer that shards parameters saves without gathering them: names with nothing behind them."""
    shapes = {name: source.shape for name in model.view.names() if (source := model.view.find(name))}
    embedding = find_embedding(shapes)
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if embedding and (embedding in empty or len(shapes[embedding]) < 2):
        empty = empty or [embedding]
    elif 2 * len(empty) <= len(shapes):
        return
    raise CheckpointError(
        f"{model.ref}: {len(empty)} of {counted(len(shapes), 'tensor')} are empty, such as {empty[0]}"
        f" {list(shapes[empty[0]])}: saved by DeepSpeed ZeRO-3 or FSDP without gathering the parameters; save the model"
        " again with stage3_gather_16bit_weights_on_model_save, or convert the training checkpoint by zero_to_fp32.py"
    )


def _resolve(
    form: Form, output: OutputTensor, accounts: Accounts, seed: int, vocabulary: Vocabulary | None
) -> TensorMerge | None:
    """Return how an output tensor comes about; None where it is left out, or the accounts note why it cannot be."""
    found = [item.view.find(item.name) for item in output.inputs]
    rule = _find_drop_rule(output.name, found)
    if rule is not None:
        for item in output.inputs:
            accounts.drop(item.view.ref, item.name, rule)
        return None
    refs = [item.view.ref for item in output.inputs]
    aligned: Sequence[Source | None] = found
    is_aligned = vocabulary is not None and vocabulary.covers(output.name, refs, found)
    try:
        if vocabulary is not None and is_aligned:
            sources = [source for source in found if source is not None]
            aligned = vocabulary.align(output.name, output.scope.base, refs, sources, form.find)
    except TensorMismatchError as error:
        accounts.mismatch(str(error))
        return None
    parts = []
    for item, source, shown in zip(output.inputs, found, aligned, strict=True):
        if source is None or shown is None:
            has = [other.view.ref for other, there in zip(output.inputs, found, strict=True) if there]
            accounts.miss(item.name, item.view.ref, has)
            continue
        accounts.use(source)
        part = Part(item.view.ref, item.name, shown, item.settings)
        if vocabulary is not None and is_aligned:
            part = replace(part, stored=source, align=partial(vocabulary.align_statistics, output.name, part.model))
        parts.append(part)
    if len(parts) < len(found):
        return None
    try:
        return make_tensor_merge(output.name, parts, output.scope, output.position, seed)
    except TensorMismatchError as error:
        accounts.mismatch(str(error))
        return None


def _find_drop_rule(name: str, found: Sequence[Source | None]) -> str | None:
    """Return why an output tensor is left out, if it is a buffer: computed by the model, not learned."""
    if name.endswith(COMPUTED_BUFFER):
        return "a buffer that models compute when they are loaded"
    if not name.endswith(OPTIONAL_BUFFERS) or None not in found:
        return None
    if name.endswith(CAUSAL_MASKS) and any(source and source.shape[:2] != (1, 1) for source in found):
        return None
    return "a buffer that models compute when they are loaded, and that not all inputs have"


def _warn_of_float64(merges: Sequence[TensorMerge]) -> list[str]:
    wide = [merge.name for merge in merges if any(source.dtype == "F64" for source in merge.sources)]
    return [f"{count_tensors(wide)} stored as float64, merged in float32"] if wide else []


def _warn_of_cancelling_weights(op: Op, merges: Sequence[TensorMerge]) -> list[str]:
    """Warn once of weights of both signs that are divided by their sum, or by the sum of those that agree."""
    found = {
        merge.name: variant.parameters
        for merge in merges
        for variant in merge.variants
        if _may_cancel(dict(variant.parameters)) and op.base is Base.REQUIRED
    }
    if not found:
        return []
    weights = dict(next(iter(found.values())))["weight"]
    return [
        f"{count_tensors(list(found))}: normalize is true, and weights have both signs ({weights}); where they nearly "
        f"cancel, values get huge: set normalize: false"
    ]


def _may_cancel(parameters: Mapping[str, ParameterValue]) -> bool:
    weights = parameters.get("weight")
    if not parameters.get("normalize") or not isinstance(weights, tuple):
        return False
    numbers = [weight for weight in weights if isinstance(weight, int | float)]
    return min(numbers, default=0) < 0 < max(numbers, default=0)
