"""Many models of one recipe, made of as few readings of its inputs as the memory allows."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Unpack

from raymerge import __version__
from raymerge.ops.own import read_own_ops
from raymerge.pipeline.checkpoint.find import find_models
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.sections.adapter import NO_UPDATE
from raymerge.pipeline.driver import check_doubts, merge_planned
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.options import MergeKeywords, MergeOptions, make_options
from raymerge.pipeline.output.state import locate_output
from raymerge.pipeline.plan.results import MergeReport
from raymerge.pipeline.plan.types import MergePlan
from raymerge.pipeline.plan.variants import select_outputs
from raymerge.pipeline.planner import make_plan
from raymerge.pipeline.progress.events import OnEvent, SweepDone, SweepPlanned, Warned
from raymerge.pipeline.progress.narrator import Narrator
from raymerge.pipeline.spectrum.batches import Batch, make_batches
from raymerge.pipeline.spectrum.extension import extend
from raymerge.pipeline.spectrum.names import name_models
from raymerge.pipeline.spectrum.places import note_places
from raymerge.pipeline.spectrum.plan import SweepPlan
from raymerge.pipeline.spectrum.points import Recipe, SweepPoint, make_points
from raymerge.pipeline.spectrum.record import (
    RECORD,
    Parent,
    Point,
    Spectrum,
    choose_url,
    locate_point,
    read_before,
    update_spectrum,
)
from raymerge.pipeline.spectrum.report import format_sweep
from raymerge.pipeline.spectrum.targets import check_no_model, check_targets
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from raymerge.pipeline.workers import Workers, find_workers, start_workers

Config = Path | str | Mapping[str, Any]
Sets = Sequence[str] | Mapping[str, object]
"""Options of `--set`, each `PATH=VALUES`; or lists of values, or their text, by path."""
Materialize = Literal["all", "none"]


@dataclass(frozen=True, slots=True)
class SweepReport:
    """The report of a sweep."""

    out: str
    spectrum: Spectrum
    """All points of the directory, those of earlier sweeps included."""
    reports: tuple[MergeReport, ...]
    """Reports of the models that this sweep has made or found complete."""
    seconds: float


def sweep(
    config: Config,
    out: str | Path,
    set: Sets = (),  # noqa: A002 - as the command line calls it
    options: MergeOptions | None = None,
    *,
    materialize: Materialize = "all",
    on_event: OnEvent | None = None,
    **keywords: Unpack[MergeKeywords],
) -> SweepReport:
    """Make many models of one recipe, or finish an earlier run of the sweep, or add points to it.

    Each has the bytes that its own merge would give.

    Args:
        config: a mergekit YAML file or its name, YAML text, or what it holds.
        out: the directory of the spectrum, as a path or URL; the models are directories in it, or for
            `hf://me/name` repositories `me/name-POINT`.
        set: what varies, such as `["t=0.1:0.9:0.1"]` or `{"t": [0.1, 0.5]}`; by default what the config's `sweep:`
            section says.
        options: how to merge.
        materialize: `none` to plan the points and make no models; see `materialised`.
        on_event: called with each event of the merges, in the caller's thread.
        **keywords: fields of `MergeOptions`; they go before those of `options`.

    Raises:
        TypeError: a keyword is no option.
        RaymergeError: something the caller can put right; running again goes on with what is finished.
    """
    start = time.perf_counter()
    options = make_options(options, keywords)
    narrator = Narrator(on_event or (lambda event: None))
    with _prepare(config, str(out), set, options) as prepared:
        stores, directory, planned = prepared.stores, prepared.directory, prepared.plan
        targets = prepared.check_targets()
        record = partial(_record, stores, directory, planned, options)
        spectrum = record()
        narrator.told(_announce(planned, materialize))
        for warning in planned.seed_warnings:
            narrator.told(Warned(warning))
        reports: list[MergeReport] = []
        if materialize == "all":
            plans, urls = [batch.plan for batch in planned.batches], [url for batch in targets for url in batch]
            workers = start_workers(stores, prepared.workers, plans, urls, options, prepared.stack)
            for batch, places in zip(planned.batches, targets, strict=True):
                measure = partial(prepared.make, batch.points, measures=True) if _needs_measuring(batch) else None
                began = time.perf_counter()
                reports += merge_planned(
                    stores, batch.plan, places, options, narrator, workers, measure=measure, start=began
                )
                spectrum = record(completed={output.fingerprint for output in batch.plan.outputs})
        collection = _gather(stores, directory, spectrum, narrator)
    report = SweepReport(directory, spectrum, tuple(reports), time.perf_counter() - start)
    narrator.told(_sum_up(report, collection))
    return report


def plan_sweep(
    config: Config,
    out: str | Path,
    set: Sets = (),  # noqa: A002 - as the command line calls it
    options: MergeOptions | None = None,
    **keywords: Unpack[MergeKeywords],
) -> SweepPlan:
    """Work out everything that a sweep will do, without writing anything; see `sweep`.

    Raises:
        TypeError: a keyword is no option.
        RaymergeError: whatever would go wrong later, as far as it can be known now.
    """
    options = make_options(options, keywords)
    with _prepare(config, str(out), set, options) as prepared:
        prepared.check_targets()
        return prepared.plan


class _Prepared:
    """A sweep that is planned, and what it is planned with."""

    def __init__(self, stores: Stores, recipe: Recipe, directory: str, options: MergeOptions, stack: ExitStack) -> None:
        self.stores, self.directory, self.stack = stores, directory, stack
        self._options = options
        configs = [point.config for point in recipe.points]
        places = [f"{directory}/{point.name}" for point in recipe.points[:1]]
        self.workers: Workers = find_workers(stores, configs, places, options, stack)
        batches = make_batches(recipe.points, self.make, self.workers.limits.num_workers)
        before = read_before(stores, directory, overwrite=options.overwrite)
        made = _make_spectrum(recipe, batches, directory, options)
        spectrum = extend(before, made, directory, overwrite=options.overwrite)
        self.plan = SweepPlan(recipe, _drop_equal(batches, spectrum), spectrum)
        if options.strict and self.plan.seed_warnings:
            raise ConfigError(f"refused because of strict: {self.plan.seed_warnings[0]}, or leave strict out")

    def make(self, points: Sequence[SweepPoint], *, measures: bool = False) -> MergePlan:
        """Plan some points together."""
        plan = make_plan(
            self.stores,
            [point.config for point in points],
            [f"{self.directory}/{point.name}" for point in points],
            self.workers.limits,
            [point.seed for point in points],
            self.workers.session,
            trust_headers=self._options.trust_headers,
            measures=measures,
        )
        check_doubts(plan, strict=self._options.strict)
        return plan

    def check_targets(self) -> list[list[str]]:
        """Return where the models of each batch go, once nothing is in the way there."""
        overwrite = self._options.overwrite
        return check_targets(self.stores, self.directory, self.plan.spectrum, self.plan.batches, overwrite=overwrite)


@contextmanager
def _prepare(config: Config, out: str, sets: Sets, options: MergeOptions) -> Iterator[_Prepared]:
    """Plan a sweep; nothing is written."""
    if options.keep_intermediates is not None:
        raise ConfigError("a sweep keeps no intermediates; merge one point by itself with keep_intermediates")
    own = None if options.ops is None else read_own_ops(options.ops)
    with open_stores(StoreSettings(options.storage, options.private)) as stores, ExitStack() as stack:
        directory = locate_output(stores, out)
        check_no_model(stores, directory)
        find = partial(find_models, stores)
        recipe = make_points(config, sets, options.seed, strict=options.strict, own=own, find=find)
        prepared = _Prepared(stores, recipe, directory, options, stack)
        if sets:
            _check_filters(prepared.plan)
        yield prepared


def _check_filters(planned: SweepPlan) -> None:
    """Refuse a sweep of one filter that matches no tensor: all its points are one model."""
    points, paths = planned.recipe.points, planned.recipe.paths
    idle = [warning for warning in planned.warnings if "matches no tensor" in warning]
    if len(points) > 1 and len(paths) == 1 and paths[0].endswith("]") and planned.num_models == 1 and idle:
        raise ConfigError(f"{paths[0]}: all its values give one model; {idle[0]}")


def _make_spectrum(recipe: Recipe, batches: Sequence[Batch], directory: str, options: MergeOptions) -> Spectrum:
    """Return the record of a sweep whose models are yet to be made; equal ones are one."""
    fingerprints = {
        point.name: output.fingerprint
        for batch in batches
        for point, output in zip(batch.points, batch.plan.outputs, strict=True)
    }
    urls = dict[str, str]()
    points = tuple(
        Point(
            name=point.name,
            url=urls.setdefault(fingerprints[point.name], choose_url(directory, point.name)),
            settings=point.settings,
            config=point.config.text,
            fingerprint=fingerprints[point.name],
            state="planned",
            error="",
            seed=point.seed,
            shard_size=options.shard_nbytes,
            trust_headers=options.trust_headers,
            ops=point.config.own.identity if point.config.own else "",
        )
        for point in recipe.points
    )
    configs = [point.config for point in recipe.points]
    models = dict.fromkeys(model for config in configs for model in config.input_models if model != NO_UPDATE)
    parents = _list_parents(models, configs, [point.name for point in points])
    places = dict.fromkeys(place for config in configs for place in config.statistics_places)
    made = Spectrum(__version__, recipe.text, recipe.paths, parents, points)
    return note_places(made, directory, [*models, *places])


def _drop_equal(batches: Sequence[Batch], spectrum: Spectrum) -> tuple[Batch, ...]:
    """Return batches in which each model is made once."""
    urls = {point.name: point.url for point in spectrum.points}
    made: set[str] = set()
    kept = []
    for batch in batches:
        positions = []
        for k, point in enumerate(batch.points):
            if urls[point.name] not in made:
                made.add(urls[point.name])
                positions.append(k)
        if positions:
            kept.append(Batch(tuple(batch.points[k] for k in positions), select_outputs(batch.plan, positions)))
    return tuple(kept)


def _record(
    stores: Stores,
    directory: str,
    planned: SweepPlan,
    options: MergeOptions,
    completed: frozenset[str] | set[str] = frozenset(),
) -> Spectrum:
    """Write down the points, with those that are finished; return the record."""

    def change(before: Spectrum | None) -> Spectrum:
        after = extend(before, planned.spectrum, directory, overwrite=options.overwrite and not completed)
        points = [
            replace(point, state="complete", error="") if point.fingerprint in completed else point
            for point in after.points
        ]
        return replace(after, points=tuple(points))

    return update_spectrum(stores, directory, change, overwrite=options.overwrite)


def _announce(planned: SweepPlan, materialize: Materialize) -> SweepPlanned:
    return SweepPlanned(
        num_points=len(planned.recipe.points),
        num_models=planned.num_models,
        num_batches=len(planned.batches),
        read_nbytes=planned.read_nbytes,
        write_nbytes=planned.write_nbytes,
        text=format_sweep(planned, makes_models=materialize == "all"),
    )


def _gather(stores: Stores, directory: str, spectrum: Spectrum, narrator: Narrator) -> str:
    """Show the models together where the store has a place for that; return where."""
    places = dict.fromkeys(locate_point(directory, point) for point in spectrum.points if point.state == "complete")
    if not places:
        return ""
    try:
        return stores.at(directory).gather(directory, list(places))
    except OutputError as error:
        narrator.told(Warned(f"the models are complete, and not in a collection: {error}"))
        return ""


def _sum_up(report: SweepReport, collection: str) -> SweepDone:
    states = [point.state for point in report.spectrum.points]
    return SweepDone(
        out=report.out,
        record=f"{report.out}/{RECORD}",
        num_points=len(states),
        num_complete=states.count("complete"),
        num_made=sum(not each.was_complete for each in report.reports),
        seconds=report.seconds,
        collection=collection,
    )


def _needs_measuring(batch: Batch) -> bool:
    return any(point.config.needs_measures for point in batch.points)


def _list_parents(
    models: Iterable[ModelRef], configs: Sequence[MergeConfig], names: Sequence[str]
) -> tuple[Parent, ...]:
    bases = {config.base_model for config in configs}
    written = {str(model): model in bases for model in models}
    short = name_models(list(written), names)
    return tuple(Parent(name, model, is_base) for name, (model, is_base) in zip(short, written.items(), strict=True))
