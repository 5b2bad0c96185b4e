"""From configs to a plan, where all models are LoRA adapters: one adapter is made of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from raymerge.pipeline.checkpoint.adapters.adapter import Adapter, open_adapters
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.files import ADAPTER_CONFIG
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.errors import AdapterGivenError, CheckpointError, ConfigError
from raymerge.pipeline.plan.adapters.recipe import expand_adapters
from raymerge.pipeline.plan.memory.places import measure_places
from raymerge.pipeline.plan.memory.projection import check_plan_fits
from raymerge.pipeline.plan.memory.shares import Limits, explain_shares
from raymerge.pipeline.plan.out_files import Network, Written
from raymerge.pipeline.plan.shards import make_fingerprint, make_tasks
from raymerge.pipeline.plan.side_files import gather_side_files
from raymerge.pipeline.plan.types import InputModel, MergePlan, PlannedOutput
from raymerge.pipeline.plan.variants import join_variants
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from raymerge.cluster.ray.session import RaySession


_OUTPUT = Network(stem="adapter_model", config_name=ADAPTER_CONFIG)


def find_adapters(
    stores: Stores, config: MergeConfig, allowed_mem: int, given: AdapterGivenError
) -> dict[ModelRef, Adapter] | None:
    """Return the adapters that a config merges among each other; None where it is one of models.

    Args:
        stores: of the inputs.
        config: that does not say `adapter`.
        allowed_mem: bytes that the plan may take.
        given: what was said of the first adapter that was found in the place of a model.

    Raises:
        ConfigError: adapters are mixed with models, or with a base.
    """
    if config.slices or config.modules or config.copy_rest_from or config.steps:
        return None
    if config.mixture or config.vocabulary or config.chat_template:
        return None
    listed = [entry.model for entry in config.models]
    try:
        adapters = _open(stores, listed, allowed_mem)
    except CheckpointError as error:
        raise given from error
    if (base := config.base_model) is not None and base not in listed:
        first = listed[0]
        raise ConfigError(
            f"base_model: {base} is given, and the models are LoRA adapters by themselves; for a model, name each after"
            f" its base, `model: {base}+{first}`; for an adapter, write `adapter: {{}}` in place of base_model"
        )
    return adapters


def _open(stores: Stores, refs: Sequence[ModelRef], allowed_mem: int) -> dict[ModelRef, Adapter]:
    def check(file: StoredFile, num_tensors: int) -> None:
        check_plan_fits(file.url, num_tensors, num_tensors, allowed_mem)

    adapters = open_adapters(stores, refs, check)
    if found := next((adapter for adapter in adapters.values() if adapter.components), None):
        raise CheckpointError(
            f"{found.url}: an adapter for a diffusion pipeline; these are not merged among each other: name each after"
            " its pipeline, as PIPELINE+ADAPTER"
        )
    return adapters


def make_adapter_plan(
    stores: Stores,
    configs: Sequence[MergeConfig],
    outs: Sequence[str],
    limits: Limits,
    seeds: Sequence[int],
    session: RaySession | None,
    adapters: Mapping[ModelRef, Adapter] | None = None,
) -> MergePlan:
    """Decide everything that a merge of adapters will do.

    Args:
        stores: of the inputs and outputs.
        configs: one for each output, of the same adapters.
        outs: paths or URLs of the outputs.
        limits: what the user allows.
        seeds: one for each output, for methods that draw random numbers.
        session: the Ray cluster that does the work, if any.
        adapters: those of the config, if they are open.

    Raises:
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    first = configs[0]
    _check_supported(first, limits)
    if adapters is None:
        adapters = _open(stores, [entry.model for entry in first.models], limits.allowed_mem)
    opened = list(adapters.values())
    recipes = [expand_adapters(config, adapters, seed) for config, seed in zip(configs, seeds, strict=True)]
    merges = join_variants([recipe.merges for recipe in recipes])
    places = [(each.url, sum(tensor.nbytes for tensor in each.tensors)) for each in opened]
    limits = measure_places(stores, places, outs, limits, session)
    limits = replace(limits, shard_nbytes=sys.maxsize)  # peft loads a single file
    tasks, num_workers, num_allowed = make_tasks(merges, limits, first.own, (_OUTPUT,))
    beside, doubts, left_out = gather_side_files(stores, [_as_checkpoint(each) for each in opened])
    outputs = []
    for position, (config, recipe) in enumerate(zip(configs, recipes, strict=True)):
        side_files = (*beside, Written(ADAPTER_CONFIG, recipe.config))
        fingerprint = make_fingerprint(tasks, side_files, position, config.op.origin)
        warnings = (*config.warnings, *recipe.warnings, *doubts)
        outputs.append(PlannedOutput(config.text, seeds[position], side_files, warnings, fingerprint))
    return MergePlan(
        own=first.own,
        tasks=tasks,
        outputs=tuple(outputs),
        donor=opened[0].ref,
        inputs=tuple(InputModel(each.ref, each.url, tuple(each.files)) for each in opened),
        statistics=(),
        adapters=(),
        op=first.op,
        chosen=(),
        notes=tuple(dict.fromkeys(note for config in configs for note in config.notes)) + recipes[0].notes,
        advice=tuple(explain_shares(tasks, limits, num_allowed)),
        dropped=tuple(left_out),
        num_workers=num_workers,
        allowed_mem=limits.allowed_mem,
        gpus=None,
        total_nbytes=sum(merge.nbytes for merge in merges),
        networks=(_OUTPUT,),
    )


def _check_supported(config: MergeConfig, limits: Limits) -> None:
    """Refuse what makes no sense for adapters, or is not there for them."""
    if limits.gpus is not None:
        raise ConfigError("adapters are merged on the CPU; leave out the memory of GPUs (--gpu-memory)")
    if config.op.statistics is not None:
        raise ConfigError(f"{config.op.name} takes {config.op.statistics.title} of models; choose another method")
    if config.steps:
        raise ConfigError("`adapter` goes with a single document; merge the others by themselves first")
    if nested := next((entry.model for entry in config.models if entry.model.adapter), None):
        raise ConfigError(f"{nested} is a model with an adapter, and `adapter` merges adapters; name the adapter alone")


def _as_checkpoint(adapter: Adapter) -> Checkpoint:
    """Return an adapter as a checkpoint, for the files beside its weights."""
    files = dict.fromkeys(tensor.file for tensor in adapter.tensors)
    beside = {name: file for name, file in adapter.files.items() if name != ADAPTER_CONFIG}
    return Checkpoint(adapter.ref, adapter.url, {}, tuple(files), beside)
