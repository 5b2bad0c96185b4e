"""The public API: one merge, from the config to the finished model, and its parts."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from raymerge.ops.own import read_own_ops
from raymerge.pipeline.checkpoint.find import find_models
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.steps import list_steps
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.execution import Execution, carry_out, check_finite
from raymerge.pipeline.messages import counted
from raymerge.pipeline.options import MergeKeywords, MergeOptions, make_options
from raymerge.pipeline.output.state import (
    OutputState,
    check_apart,
    check_state,
    locate_output,
    measure_nbytes,
    open_output,
    read_manifest,
)
from raymerge.pipeline.output.stitch import list_outputs
from raymerge.pipeline.output.verify import check_model
from raymerge.pipeline.plan.results import MergeReport
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.plan.variants import select_files, select_outputs
from raymerge.pipeline.planner import make_plan
from raymerge.pipeline.progress.events import OnEvent
from raymerge.pipeline.progress.narrator import Narrator
from raymerge.pipeline.progress.report import make_report
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import Library, StoreSettings
from raymerge.pipeline.workers import Workers, find_workers, make_limits, make_local_limits, start_workers

if TYPE_CHECKING:
    pass

Config = Path | str | Mapping[str, Any]
"""A YAML file or its name, YAML text, or its content."""


def plan(
    config: Config,
    options: MergeOptions | None = None,
    *,
    out: str | Path | None = None,
    **keywords: Unpack[MergeKeywords],
) -> MergePlan:
    """Work out everything that a merge will do, reading hardly more than headers.

    The plan is for this machine; of `ray` and `address` it counts the memory that Ray takes, and no other machines.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds.
        options: how to merge.
        out: where the output will go, as a path or URL; it decides how much memory writing takes. A local directory by
            default.
        **keywords: fields of `MergeOptions`; they go before those of `options`.

    Raises:
        TypeError: a keyword is no option.
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    options = make_options(options, keywords)
    limits = make_local_limits(options)
    own = None if options.ops is None else read_own_ops(options.ops)
    with open_stores(StoreSettings(options.storage)) as stores:
        loaded = load_config(config, strict=options.strict, own=own, find=partial(find_models, stores))
        where = ["." if out is None else str(out)]
        headers = options.trust_headers
        made = make_plan(stores, [loaded], where, limits, [options.seed], trust_headers=headers, measures=False)
        check_doubts(made, strict=options.strict)
        return made


def merge(
    config: Config,
    out: str | Path,
    options: MergeOptions | None = None,
    *,
    on_event: OnEvent | None = None,
    **keywords: Unpack[MergeKeywords],
) -> MergeReport:
    """Merge models, or finish an earlier run of the same merge.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds.
        out: the output directory, as a path or URL.
        options: how to merge.
        on_event: called with each event of the merge, in the caller's thread.
        **keywords: fields of `MergeOptions`; they go before those of `options`.

    Raises:
        TypeError: a keyword is no option.
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    options = make_options(options, keywords)
    kept = {} if options.keep_intermediates is None else _check_intermediates(config, str(out), options)
    report = merge_variants([config], [out], options, on_event=on_event)[0]
    for place, step in kept.items():
        merge_variants([step], [place], options, on_event=on_event)
    return report


def merge_variants(
    configs: Sequence[Config | MergeConfig],
    outs: Sequence[str | Path],
    options: MergeOptions | None = None,
    *,
    on_event: OnEvent | None = None,
    **keywords: Unpack[MergeKeywords],
) -> list[MergeReport]:
    """Make several models that differ in parameters alone, reading their inputs once.

    Each output has the bytes that its own merge would give.

    Args:
        configs: one for each output: mergekit YAML files, their text, or their content.
        outs: the output directories, as paths or URLs.
        options: how to merge.
        on_event: called with each event of the merge, in the caller's thread.
        **keywords: fields of `MergeOptions`; they go before those of `options`.

    Raises:
        TypeError: a keyword is no option.
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    start = time.perf_counter()
    options = make_options(options, keywords)
    narrator = Narrator(on_event or (lambda event: None))
    own = None if options.ops is None else read_own_ops(options.ops)
    with open_stores(StoreSettings(options.storage, options.private)) as stores, ExitStack() as stack:
        check_outs(stores, configs, outs)
        find = partial(find_models, stores)
        load = partial(load_config, strict=options.strict, own=own, find=find)
        loaded = [config if isinstance(config, MergeConfig) else load(config) for config in configs]
        workers = find_workers(stores, loaded, outs, options, stack)
        make = partial(
            make_plan,
            stores,
            loaded,
            [str(out) for out in outs],
            workers.limits,
            [options.seed] * len(outs),
            workers.session,
            trust_headers=options.trust_headers,
        )
        the_plan = make(measures=False)
        check_doubts(the_plan, strict=options.strict)
        targets = [check_target(stores, the_plan, k, out, overwrite=options.overwrite) for k, out in enumerate(outs)]
        workers = start_workers(stores, workers, [the_plan], targets, options, stack)
        measure = None
        if any(config.needs_measures for config in loaded):
            measure = partial(make, measures=True)
        return merge_planned(stores, the_plan, targets, options, narrator, workers, measure=measure, start=start)


def merge_planned(
    stores: Stores,
    the_plan: MergePlan,
    targets: Sequence[str],
    options: MergeOptions,
    narrator: Narrator,
    workers: Workers,
    *,
    measure: Callable[[], MergePlan] | None = None,
    start: float,
) -> list[MergeReport]:
    """Carry out a plan whose outputs have been checked, as far as earlier runs have not done so.

    Args:
        stores: of inputs and outputs.
        the_plan: what to do.
        targets: the outputs' absolute paths or URLs.
        options: how to merge.
        narrator: told how it goes.
        workers: do the work.
        measure: makes the plan once more, with what takes a pass through a model, where anything does.
        start: when the merge began, by `time.perf_counter`.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with the finished shards.
    """
    narrator.planned(the_plan)
    on_held = narrator.held if options.wait else None
    with ExitStack() as stack:
        held = {  # in one order, so that no two runs wait for each other
            target: stack.enter_context(
                open_output(
                    stores,
                    target,
                    fingerprint,
                    list_outputs(the_plan),
                    overwrite=options.overwrite,
                    on_held=on_held,
                )
            )
            for target, fingerprint in sorted(
                zip(targets, (output.fingerprint for output in the_plan.outputs), strict=True)
            )
        }
        opened = [held[target] for target in targets]
        unfinished = [k for k, (state, _) in enumerate(opened) if state is not OutputState.COMPLETE]
        complete = [k for k in range(len(targets)) if k not in unfinished]
        if options.recheck:
            for k in complete:
                _recheck(stores, targets[k], workers.limits.num_workers)
        nonfinite = {k: read_manifest(stores, targets[k]).nonfinite for k in complete}
        for found in nonfinite.values():
            check_finite(found, strict=options.strict)
        done = Execution()
        if unfinished and measure is not None:
            the_plan = measure()  # by now nothing else can be wrong
        if unfinished:
            done = carry_out(
                stores,
                select_outputs(the_plan, unfinished),
                [targets[k] for k in unfinished],
                [opened[k][1] for k in unfinished],
                narrator,
                workers.session,
                workers.hired,
                strict=options.strict,
                recheck=options.recheck,
            )
            nonfinite |= dict(zip(unfinished, done.nonfinite, strict=True))
        faults = stores.faults.drain()
        reports = [
            make_report(
                the_plan,
                target,
                select_files(done.results, done.positions, unfinished.index(k)) if k in unfinished else (),
                seconds=time.perf_counter() - start,
                work_seconds=done.seconds,
                num_per_process=done.num_per_process,
                faults=faults,
                nonfinite=nonfinite[k],
                limits=stores.faults.limits,
                was_complete=k not in unfinished,
            )
            for k, target in enumerate(targets)
        ]
    for report in reports:
        narrator.reported(report)
    return reports


def check_doubts(plan: MergePlan, *, strict: bool) -> None:
    """Refuse a plan with warnings if that is wanted."""
    if strict and plan.warnings:
        doubts = "\n  ".join(plan.warnings)
        raise ConfigError(f"refused because of strict:\n  {doubts}\nput these right, or leave strict out")


def check_output(plan: MergePlan, out: str | Path, *, overwrite: bool = False, storage: Library = "auto") -> str:
    """Make sure that a plan can be carried out in a directory, without writing anything; return its absolute URL.

    Raises:
        RaymergeError: it overlaps with an input, holds something else, or has no room.
    """
    with open_stores(StoreSettings(storage)) as stores:
        return check_target(stores, plan, 0, out, overwrite=overwrite)


def _check_intermediates(config: Config, out: str, options: MergeOptions) -> dict[str, MergeConfig]:
    """Return the documents that others use, by the directory that each is to be written to, once nothing is in the way.

    Raises:
        RaymergeError: a directory is that of another output or of any document's input, or holds something else.
    """
    limits, own = make_limits(options), read_own_ops(options.ops) if options.ops else None
    with open_stores(StoreSettings(options.storage, options.private)) as stores:
        whole = load_config(config, own=own, find=partial(find_models, stores))
        kept = {f"{options.keep_intermediates}/{step.name}": step for step in list_steps(whole)}
        check_outs(stores, [whole, *kept.values()], [out, *kept])
        make = partial(make_plan, stores, trust_headers=options.trust_headers, measures=False)
        inputs = make([whole], [out], limits, [options.seed]).directories
        for place, step in kept.items():
            check_apart(stores, locate_output(stores, place), inputs)
            check_target(stores, make([step], [place], limits, [options.seed]), 0, place, overwrite=options.overwrite)
    return kept


def check_outs(stores: Stores, configs: Sequence[Config | MergeConfig], outs: Sequence[str | Path]) -> None:
    """Make sure that there is an output for each config, and that none lies in another.

    Raises:
        ConfigError: naming two outputs.
    """
    if not configs or len(configs) != len(outs):
        given = f"{counted(len(configs), 'config')} and {counted(len(outs), 'output')}"
        raise ConfigError(f"{given} are given; give one output for each config")
    places = [stores.at(str(out)).resolve(str(out)) for out in outs]
    for k, out in enumerate(outs):
        if places[k] in places[:k]:
            raise ConfigError(f"the output {out} is given twice; give each config one of its own")
        if inner := next((place for place in places[:k] if place.startswith(f"{places[k]}/")), None):
            raise ConfigError(f"the output {inner} lies in {out}, which is made after it; choose another directory")


def check_target(stores: Stores, plan: MergePlan, position: int, out: str | Path, *, overwrite: bool) -> str:
    """Make sure that an output of a plan can be made in a directory, without writing anything; return its absolute URL.

    Raises:
        RaymergeError: it overlaps with an input, holds something else, or has no room.
    """
    target = locate_output(stores, out)
    check_apart(stores, target, plan.directories)
    check_state(stores, target, plan.outputs[position].fingerprint, overwrite=overwrite)
    stores.at(target).check_space(target, count_nbytes(plan, position) - measure_nbytes(stores, target))
    return target


def count_nbytes(plan: MergePlan, position: int) -> int:
    """Return the bytes of an output of a plan."""
    side_files = plan.outputs[position].side_files
    return sum(task.outputs[position].nbytes for task in plan.tasks) + sum(file.nbytes for file in side_files)


def _recheck(stores: Stores, out: str, num_workers: int) -> None:
    """Compare every file of a finished output with its checksum."""
    try:
        check_model(stores, out, num_workers)
    except OutputError as error:
        raise OutputError(f"{error}\ngive --overwrite to make it again") from None
