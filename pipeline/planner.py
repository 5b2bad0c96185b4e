"""From configs to a plan: which files, tensors, shards and how much memory.

Reads headers and small files; of tensors only small integers, small ones of float32 that are rounded, and a sample of a
head that is said to be the embedding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from raymerge.cluster.host import measure_memory
from raymerge.pipeline.checkpoint.adapters.adapter import Adapter, open_adapters
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, resolve_models
from raymerge.pipeline.checkpoint.files import CONFIG, is_tokenizer
from raymerge.pipeline.checkpoint.model_config import dump_config
from raymerge.pipeline.checkpoint.quantised import QUANTISED_FILES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.side_files import explain_left_out, find_side_files
from raymerge.pipeline.checkpoint.statistics import find_statistics, index_statistics
from raymerge.pipeline.checkpoint.tying import has_own_head
from raymerge.pipeline.checkpoint.views import StoredView, View
from raymerge.pipeline.config.merge_config import MergeConfig, Mixture
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.plan.chat_template import set_chat_template
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.gates import Base, Gates, make_gates
from raymerge.pipeline.plan.integers import check_integers
from raymerge.pipeline.plan.intermediate import Inputs, check_rows, expand_steps
from raymerge.pipeline.plan.memory import LOCAL_FETCH_NBYTES, MAX_FETCH_NBYTES, Transfer, check_plan_fits
from raymerge.pipeline.plan.recipe import expand, open_model
from raymerge.pipeline.plan.rounding import warn_of_rounding
from raymerge.pipeline.plan.schedule import explain_gpus, explain_idle
from raymerge.pipeline.plan.shards import make_fingerprint, make_tasks
from raymerge.pipeline.plan.shares import Limits, explain_shares
from raymerge.pipeline.plan.token_numbers import warn_of_tokenizers
from raymerge.pipeline.plan.tokenizers import finish_config, finish_files, plan_vocabulary
from raymerge.pipeline.plan.types import Copied, InputAdapter, InputModel, MergePlan, PlannedOutput, SideFile, Written
from raymerge.pipeline.plan.variants import join_variants
from raymerge.pipeline.runners import count_slots
from raymerge.pipeline.stores.files import ByteRange, StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession


_CACHED = 0.5
"""Share of a machine's memory up to which files stay in its page cache while they are merged."""


@contextmanager
def pause_collector() -> Iterator[None]:
    """Leave the collector out for a while: where a million objects are made, looking for cycles takes a fifth of it."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@pause_collector()
def make_plan(
    stores: Stores,
    configs: Sequence[MergeConfig],
    outs: Sequence[str],
    limits: Limits,
    seed: int,
    session: RaySession | None = None,
    *,
    trust_headers: bool = False,
    measures: bool = True,
) -> MergePlan:
    """Decide everything that a merge will do, or several merges that differ in parameters alone.

    Args:
        stores: of the inputs and outputs.
        configs: one for each output, of the same models.
        outs: paths or URLs of the outputs; they decide how much memory writing takes.
        limits: what the user allows.
        seed: for methods that draw random numbers.
        session: the Ray cluster that does the work, if any.
        trust_headers: whether files of weights decide where they and the index disagree, or it is missing.
        measures: whether what takes a pass through a model is computed; a plan that nobody carries out does without.

    Raises:
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    from raymerge.pipeline.checkpoint.table import (  # pyarrow: slow to import
        index_tensors,
        list_tensors,
        read_table,
        release_tables,
    )

    first = configs[0]
    if any(config.input_models != first.input_models for config in configs):
        raise ConfigError("the variants of one plan name different models; they may differ in parameters only")
    if any(config.statistics != first.statistics for config in configs):
        raise ConfigError("the variants of one plan name different statistics; they may differ in parameters only")
    checkpoints = resolve_models(stores, first.input_models, trust_headers=trust_headers)
    statistics_files = find_statistics(
        stores, tuple(dict.fromkeys(first.statistics.values())), {c.url: c.model for c in checkpoints}
    )

    def check(file: StoredFile, num_tensors: int) -> None:
        check_plan_fits(file.url, num_tensors, num_tensors, limits.allowed_mem)

    weights = {str(c.model.without_adapter): c.weight_files for c in checkpoints}
    table = read_table(stores, weights, check)
    statistics_table = read_table(stores, {str(found.ref): found.files for found in statistics_files}, check)
    num_stored = len(table) + len(statistics_table)
    check_plan_fits("the inputs together", num_stored, len(table) // len(weights), limits.allowed_mem)
    tensors, stored_statistics = list_tensors(table), list_tensors(statistics_table)
    adapters = open_adapters(stores, [c.model.adapter for c in checkpoints if c.model.adapter], check)
    del table, statistics_table
    release_tables()
    views: dict[ModelRef, View] = {
        found.ref: StoredView(found.ref, index_statistics(stored_statistics.get(str(found.ref), ())))
        for found in statistics_files
    }
    models = []
    doubts: list[str] = []
    own_heads: dict[str, bool] = {}
    for checkpoint in checkpoints:
        alone = str(checkpoint.model.without_adapter)
        stored, more = index_tensors(checkpoint, tensors.get(alone, ()))
        doubts += [*checkpoint.warnings, *more]
        if alone not in own_heads:
            own_heads[alone] = has_own_head(stores, checkpoint.config, stored)
        place = first.statistics.get(checkpoint.model)
        models.append(
            open_model(
                checkpoint,
                stored,
                has_own_head=own_heads[alone],
                statistics=None if place is None else views[place],
                adapter=adapters[checkpoint.model.adapter] if checkpoint.model.adapter else None,
            )
        )
    if any(config.vocabulary != first.vocabulary for config in configs):
        raise ConfigError("the variants of one plan ask for different tokenizers; they may differ in parameters only")
    merged = [expand_steps(config, checkpoints, models, seed) for config in configs]
    planned = plan_vocabulary(stores, first, merged[0].checkpoints, merged[0].models, limits.allowed_mem)
    vocabulary = planned.vocabulary if planned else None
    gates = [
        None
        if config.mixture is None
        else cache(partial(_make_gates, stores, inputs, config.mixture, seed, limits.allowed_mem, measures=measures))
        for config, inputs in zip(configs, merged, strict=True)
    ]
    recipes = [
        expand(config, inputs.models, seed, vocabulary, found)
        for config, inputs, found in zip(configs, merged, gates, strict=True)
    ]
    donor = merged[0].checkpoints[0]
    merges = join_variants(recipes)
    check_rows(merges)
    check_integers(stores, merges)
    doubts += warn_of_rounding(stores, merges, first.keep_float32)
    read = [(c.url, sum(file.nbytes for file in c.weight_files)) for c in checkpoints]
    read += [(found.url, sum(file.nbytes for file in found.files)) for found in statistics_files]
    read += [(adapter.url, sum(tensor.nbytes for tensor in adapter.tensors)) for adapter in adapters.values()]
    transfer = _measure_transfer(stores, [url for url, _ in read], outs, limits)
    limits = replace(limits, transfer=transfer, is_cached=_is_cached(stores, read, session))
    tasks, num_workers, num_allowed = make_tasks(merges, limits, first.own)
    others = [checkpoint for checkpoint in checkpoints if checkpoint.url != donor.url]
    beside, more_doubts, left_out = _gather_side_files(stores, [donor, *others])
    doubts += more_doubts
    if planned is not None:
        beside, more_doubts, more_left_out = finish_files(stores, planned, beside, donor)
        left_out += more_left_out
        doubts += [*planned.warnings, *planned.vocabulary.warn(), *more_doubts]
        doubts += [warning for recipe in recipes for warning in finish_config(planned, recipe.config)]
    else:
        keeps_template = first.chat_template is None
        doubts += warn_of_tokenizers(stores, [donor, *others], limits.allowed_mem, keeps_template=keeps_template)
    outputs = []
    notes = [note for config in configs for note in config.notes] + [*recipes[0].notes]
    notes += [note for found in gates if found and (note := found().note)]
    origin = "".join(config.op.origin for config in (*first.steps, first))
    for position, (config, recipe, inputs) in enumerate(zip(configs, recipes, merged, strict=True)):
        files, doubts_here = beside, list[str]()
        if config.chat_template is not None:
            files, doubts_here, said = set_chat_template(
                stores, config.chat_template, inputs.checkpoints, beside, are_donors=planned is None or planned.is_donor
            )
            notes += said
        side_files: tuple[SideFile, ...] = (*files, Written(CONFIG, dump_config(recipe.config)))
        fingerprint = make_fingerprint(tasks, side_files, position, origin)
        warnings = (*config.warnings, *doubts, *doubts_here, *inputs.warnings, *recipe.warnings)
        outputs.append(PlannedOutput(config.text, seed, side_files, warnings, fingerprint))
    advice = explain_shares(tasks, limits, num_allowed)
    if idle := explain_idle(tasks, count_slots(num_allowed, session, limits.gpus)):
        advice.append(idle)
    if limits.gpus is not None and session is None and (faster := explain_gpus(tasks, limits.num_workers)):
        advice.append(faster)
    return MergePlan(
        own=first.own,
        tasks=tasks,
        outputs=tuple(outputs),
        donor=donor.model,
        inputs=tuple(InputModel(c.model, c.url, tuple(c.files)) for c in checkpoints),
        statistics=tuple(InputModel(found.ref, found.url, found.names) for found in statistics_files),
        adapters=_list_adapters(adapters, models),
        op=first.op,
        chosen=_describe_run(first),
        notes=tuple(dict.fromkeys(notes)),
        vocabulary=tuple(planned.vocabulary.describe()) if planned else (),
        advice=tuple(advice),
        dropped=(*merged[0].dropped, *recipes[0].dropped, *left_out),
        num_workers=num_workers,
        allowed_mem=limits.allowed_mem,
        gpus=limits.gpus,
        total_nbytes=sum(merge.nbytes for merge in merges),
    )


def _list_adapters(adapters: Mapping[ModelRef, Adapter], models: Sequence[Model]) -> tuple[InputAdapter, ...]:
    effects: dict[ModelRef, list[str]] = {ref: [] for ref in adapters}
    for model in models:
        if model.adapter is not None:
            effects[model.adapter.ref].append(f"{model.ref.without_adapter}: {model.adapter}")
    return tuple(
        InputAdapter(InputModel(ref, adapter.url, tuple(adapter.files)), tuple(effects[ref]))
        for ref, adapter in adapters.items()
    )


def _make_gates(
    stores: Stores, inputs: Inputs, mixture: Mixture, seed: int, allowed_mem: int, *, measures: bool
) -> Gates:
    """Return the weights of a mixture's routers."""
    model = inputs.models[0]
    base = Base(inputs.checkpoints[0], model.view, model.layers, model.width("hidden_size") or 0)
    return make_gates(stores, mixture, base, seed, allowed_mem, measures=measures)


def _check_readable(stores: Stores, files: Sequence[Copied]) -> None:
    """Read a byte of each file of this machine that is to be copied, which happens after all shards are made."""
    ranges = [ByteRange(file.source, 0, 1) for file in files if scheme_of(file.source.url) == "file" and file.nbytes]
    if ranges:
        stores.at(ranges[0].file.url).read_ranges(ranges)


def _is_cached(stores: Stores, inputs: Sequence[tuple[str, int]], session: RaySession | None) -> bool:
    """Return whether the inputs lie on this machine, and stay in its page cache once they have been read."""
    if session is not None and session.is_elsewhere:
        return False
    if any(stores.at(url).is_remote for url, _ in inputs):
        return False
    return sum(nbytes for _, nbytes in inputs) <= _CACHED * measure_memory()


def _describe_run(config: MergeConfig) -> tuple[str, ...]:
    """Return the models that a pattern has found, with the weights of a schedule."""
    if not config.is_run:
        return ()
    weights = [entry.parameters["weight"].value("", 0.0) if entry.parameters else None for entry in config.models]
    return tuple(
        str(entry.model) if weight is None else f"{entry.model} {weight:.4g}"
        for entry, weight in zip(config.models, weights, strict=True)
    )


def _measure_transfer(stores: Stores, urls: Sequence[str], outs: Sequence[str], limits: Limits) -> Transfer:
    inputs = dict.fromkeys(stores.at(url) for url in urls)
    outputs = [stores.at(out) for out in outs]
    is_remote = any(storage.is_remote for storage in inputs)
    transfer = Transfer(
        num_buffers=2 if is_remote or limits.gpus is not None else 1,
        nbytes=sum(storage.read_nbytes for storage in inputs)
        + sum(storage.write_nbytes for storage in outputs)
        + sum(storage.library_nbytes for storage in {*inputs, *outputs})
        + limits.runner_nbytes,
        num_outputs=len(outs),
    )
    if is_remote:
        return replace(transfer, staging_nbytes=MAX_FETCH_NBYTES)
    return transfer if limits.gpus is not None else replace(transfer, fetch_nbytes=LOCAL_FETCH_NBYTES)


def _gather_side_files(
    stores: Stores, checkpoints: Sequence[Checkpoint]
) -> tuple[list[SideFile], list[str], list[str]]:
    """Return the donor's files that an output gets besides weights, warnings, and lines on what stays behind."""
    donor, *others = checkpoints
    found = find_side_files(stores, donor)
    copied = [Copied(name, file) for name, file in found.copied if name not in QUANTISED_FILES]
    _check_readable(stores, copied)
    side_files: list[SideFile] = [*copied, *(Written(name, text) for name, text in found.masked)]
    warnings = [f"{donor.model}: {name} holds a credential, which the output gets as ***" for name, _ in found.masked]
    part = stores.at(donor.url).explain_part(donor.url)
    if found.missing:
        hint = f"; {part}" if part else ""
        warnings.append(f"{donor.model}: {listing(found.missing)} missing, which its configs name (auto_map){hint}")
    if part and not any(is_tokenizer(file.name) for file in side_files):
        warnings.append(f"{donor.model}: there is no tokenizer, so the output gets none; {part}")
    for name in found.module_weights:
        also = ", ".join(str(other.model) for other in others if name in other.files)
        unused = f"; those of {also} are not used" if also else ""
        warnings.append(f"{name}: weights of a module of its own, copied from {donor.model} and not merged{unused}")
    left_out = [*explain_left_out(donor, found.left_out, is_donor=True)]
    for other in others:
        weights = {file.url for file in other.weight_files}
        names = [name for name, file in other.files.items() if file.url not in weights]
        left_out += explain_left_out(other, names, is_donor=False)
    return side_files, warnings, left_out
