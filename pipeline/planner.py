"""From configs to a plan: which files, tensors, shards and how much memory.

Reads headers and small files; of tensors only small integers, small ones of float32 that are rounded, and a sample of a
head that is said to be the embedding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from raymerge.pipeline.adapter_planner import find_adapters, make_adapter_plan
from raymerge.pipeline.checkpoint.files import PIPELINE
from raymerge.pipeline.checkpoint.model_config import dump_config
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import TokenizerReader
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import AdapterGivenError, ConfigError
from raymerge.pipeline.plan.directory import finish_directory, gather_files
from raymerge.pipeline.plan.filters import warn_of_idle_filters
from raymerge.pipeline.plan.intermediate import MergeInputs, Planning, expand_steps
from raymerge.pipeline.plan.memory.places import measure_places
from raymerge.pipeline.plan.memory.shares import Limits, explain_shares
from raymerge.pipeline.plan.out_files import Network, Written
from raymerge.pipeline.plan.recipe import Recipe, expand
from raymerge.pipeline.plan.rounding import warn_of_rounding
from raymerge.pipeline.plan.schedule import explain_gpus, explain_idle
from raymerge.pipeline.plan.shards import make_fingerprint, make_tasks
from raymerge.pipeline.plan.sources.integers import check_integers
from raymerge.pipeline.plan.stored_inputs import open_inputs
from raymerge.pipeline.plan.types import MergePlan, PlannedOutput, ShardTask
from raymerge.pipeline.plan.variants import join_variants
from raymerge.pipeline.plan.vocabulary.tokenizers import finish_config, plan_vocabulary
from raymerge.pipeline.runners import count_slots
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession


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
    seeds: Sequence[int],
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
        seeds: one for each output, for methods that draw random numbers.
        session: the Ray cluster that does the work, if any.
        trust_headers: whether files of weights decide where they and the index disagree, or it is missing.
        measures: whether what takes a pass through a model is computed; a plan that nobody carries out does without.

    Raises:
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    _check_alike(configs)
    first = configs[0]
    if any(each.adapter is not None for each in (first, *first.steps)):
        return make_adapter_plan(stores, configs, outs, limits, seeds, session)
    try:
        stored = open_inputs(stores, first, limits.allowed_mem, trust_headers=trust_headers)
    except AdapterGivenError as error:
        if (adapters := find_adapters(stores, first, limits.allowed_mem, error)) is None:
            raise
        return make_adapter_plan(stores, configs, outs, limits, seeds, session, adapters)
    doubts = [*stored.warnings]
    parts = stored.parts.merged
    reader = TokenizerReader(stores, limits.allowed_mem)
    plannings = [Planning(stores, seed, limits.allowed_mem, reader, measures) for seed in seeds]
    inputs = [
        [
            expand_steps(planning, part.configure(config), part.checkpoints, models, stored.statistics_views)
            for part, models in zip(parts, stored.models, strict=True)
        ]
        for config, planning in zip(configs, plannings, strict=True)
    ]
    whole = inputs[0][0]
    if not whole.checkpoints[0].prefix:
        configs = [each.config for (each,) in inputs]
        first = configs[0]
    planned = plan_vocabulary(stores, first, whole.checkpoints, whole.models, reader, whole.others)
    vocabulary = planned.vocabulary if planned else None
    gates = [
        each[0].open_gates(planning, config) for each, planning, config in zip(inputs, plannings, configs, strict=True)
    ]
    recipes = [
        [expand(each.config, each.models, seed, vocabulary, found) for each in of_config]
        for config, of_config, found, seed in zip(configs, inputs, gates, seeds, strict=True)
    ]
    merges = join_variants([tuple(merge for recipe in of_parts for merge in recipe.merges) for of_parts in recipes])
    check_integers(stores, merges)
    doubts += warn_of_rounding(stores, merges, first.keep_float32)

    limits = measure_places(stores, stored.list_places(), outs, limits, session)
    networks = tuple(Network(part.prefix, part.stem) for part in parts)
    tasks, num_workers, num_allowed = make_tasks(merges, limits, first.own, networks)

    checkpoints = stored.checkpoints if stored.checkpoints[0].components else whole.checkpoints
    donor = checkpoints[0]
    gathered = gather_files(stores, first, checkpoints, planned, limits.allowed_mem)
    doubts += gathered.warnings
    if planned is not None:
        doubts += [warning for (recipe,) in recipes for warning in finish_config(planned, recipe.config)]
    outputs = []
    notes = [note for config in configs for note in config.notes] + [*stored.parts.notes]
    notes += [note for recipe in recipes[0] for note in recipe.notes]
    notes += [note for each in inputs for found in each for note in found.notes]
    notes += [note for found in gates if found and (note := found().note)]
    origin = "".join(config.op.origin for config in (*first.steps, first))
    for position, (config, of_parts, each) in enumerate(zip(configs, recipes, inputs, strict=True)):
        texts = [dump_config(recipe.config) for recipe in of_parts]
        written = [Written(network.config, text) for network, text in zip(networks, texts, strict=True)]
        if donor.components:
            written.append(Written(PIPELINE, dump_config(donor.config)))
        directory = finish_directory(stores, config, each[0].checkpoints, planned, gathered, written)
        notes += directory.notes
        fingerprint = make_fingerprint(tasks, directory.files, position, origin)
        told = [
            f"{part.prefix[:-1]}: {warning}" if part.prefix else warning
            for part, recipe, found in zip(parts, of_parts, each, strict=True)
            for warning in (*found.warnings, *recipe.warnings)
        ]
        told += warn_of_idle_filters(config, partial(_list_names, of_parts, each))
        warnings = (*config.warnings, *doubts, *directory.warnings, *told)
        outputs.append(PlannedOutput(config.text, seeds[position], directory.files, warnings, fingerprint))
    return MergePlan(
        own=first.own,
        tasks=tasks,
        outputs=tuple(outputs),
        donor=donor.model,
        inputs=stored.list_models(),
        statistics=stored.list_statistics(),
        adapters=stored.list_adapters(),
        op=first.op,
        chosen=_describe_run(first),
        notes=tuple(dict.fromkeys(notes)),
        vocabulary=tuple(planned.vocabulary.describe()) if planned else (),
        advice=_advise(tasks, limits, num_allowed, session),
        dropped=tuple(
            dict.fromkeys(
                (
                    *(line for found in inputs[0] for line in found.dropped),
                    *(line for recipe in recipes[0] for line in recipe.dropped),
                    *stored.parts.left_out,
                    *gathered.left_out,
                )
            )
        ),
        num_workers=num_workers,
        allowed_mem=limits.allowed_mem,
        gpus=limits.gpus,
        total_nbytes=sum(merge.nbytes for merge in merges),
        networks=networks,
    )


def _check_alike(configs: Sequence[MergeConfig]) -> None:
    """Refuse variants that differ in more than parameters."""
    first = configs[0]
    for config in configs:
        differing = {
            "name different models": config.input_models != first.input_models,
            "name different statistics": config.statistics != first.statistics,
            "ask for different tokenizers": config.vocabulary != first.vocabulary,
        }
        for what, is_so in differing.items():
            if is_so:
                raise ConfigError(f"the variants of one plan {what}; they may differ in parameters only")


def _advise(
    tasks: Sequence[ShardTask], limits: Limits, num_allowed: int, session: RaySession | None
) -> tuple[str, ...]:
    """Return what would make the merge faster."""
    advice = [*explain_shares(tasks, limits, num_allowed)]
    if idle := explain_idle(tasks, count_slots(num_allowed, session, limits.gpus)):
        advice.append(idle)
    if limits.gpus is not None and session is None and (faster := explain_gpus(tasks, limits.num_workers)):
        advice.append(faster)
    return tuple(advice)


def _list_names(recipes: Sequence[Recipe], inputs: Sequence[MergeInputs]) -> set[str]:
    """Return all names that filters may see."""
    outputs = {merge.name for recipe in recipes for merge in recipe.merges}
    return outputs.union(*(model.view.names() for each in inputs for model in each.models))


def _describe_run(config: MergeConfig) -> tuple[str, ...]:
    """Return the models that a pattern has found, with the weights of a schedule."""
    if not config.is_run:
        return ()
    weights = [entry.parameters["weight"].value("", 0.0) if entry.parameters else None for entry in config.models]
    return tuple(
        str(entry.model) if weight is None else f"{entry.model} {weight:.4g}"
        for entry, weight in zip(config.models, weights, strict=True)
    )
