"""The public API of a search."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from raymerge.ops.own import read_own_ops
from raymerge.pipeline.curve.front import find_dominators
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.evaluation.events import OnEvaluationEvent
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.output.state import locate_output
from raymerge.pipeline.progress.events import OnEvent
from raymerge.pipeline.search.best import make_costs
from raymerge.pipeline.search.models import Models
from raymerge.pipeline.search.options import SearchOptions
from raymerge.pipeline.search.recipe import Config, read_recipe
from raymerge.pipeline.search.results import SearchReport
from raymerge.pipeline.search.run import OnBatch, OnRetry, OnTrial, Run, Telling
from raymerge.pipeline.spectrum.record import EVALUATIONS
from raymerge.pipeline.stores.open import open_stores
from raymerge.pipeline.stores.settings import StoreSettings
from raymerge.pipeline.urls import scheme_of

LOCK = "search.lock"


def search(
    recipe: Config,
    out: str | Path,
    tasks: Sequence[str | Path],
    options: SearchOptions | None = None,
    *,
    merging: MergeOptions | None = None,
    evaluating: EvaluateOptions | None = None,
    on_batch: OnBatch | None = None,
    on_trial: OnTrial | None = None,
    on_retry: OnRetry | None = None,
    on_warning: Callable[[str], None] | None = None,
    on_event: OnEvent | None = None,
    on_evaluation: OnEvaluationEvent | None = None,
) -> SearchReport:
    """Search a recipe's parameters for the best models, or finish an earlier run of the search.

    Args:
        recipe: a mergekit YAML file or its name, YAML text, or what it holds, with a `search:` section.
        out: a directory or URL; it becomes a spectrum of the best models, with the evaluations of all.
        tasks: as `evaluate` takes them.
        options: how to search.
        merging: how to merge; on Ray, models are also evaluated there.
        evaluating: how to evaluate.
        on_batch: told of each batch before it is merged.
        on_trial: told of each trial when its values are known.
        on_retry: told how many trials that failed in earlier runs are tried again, before they are.
        on_warning: told of what the plans of the recipe warn of, once.
        on_event: told what happens in merges.
        on_evaluation: told what happens in evaluations.

    Raises:
        RaymergeError: something the caller can put right; running again goes on with what is finished.
    """
    start = time.perf_counter()
    options = options or SearchOptions()
    merging = merging or MergeOptions()
    evaluating = evaluating or EvaluateOptions()
    if evaluating.eval_results:
        raise ConfigError("models of a search come and go; `raymerge eval OUT --eval-results` writes those of the best")
    if merging.overwrite:
        raise ConfigError("a search goes on with what is in its directory; to begin anew, choose another directory")
    telling = Telling(
        on_batch or (lambda start, stop: None),
        on_trial or (lambda trial, number: None),
        on_retry or (lambda count: None),
    )
    with open_stores(StoreSettings(merging.storage, merging.private)) as stores, ExitStack() as stack:
        place = locate_output(stores, out)
        if scheme_of(place) in ("hf", "http", "https"):
            raise ConfigError(
                f"{place}: a search deletes models that are not among the best; search in a directory or bucket"
            )
        own = read_own_ops(merging.ops) if merging.ops else None
        read = read_recipe(recipe, is_soup=options.sampler == "soup", own=own)
        names = [str(task) for task in tasks]
        models = Models(
            stores, place, read, names, merging, on_event, on_evaluation, on_warning or (lambda warning: None)
        )
        evaluating = replace(
            evaluating,
            out=f"{place}/{EVALUATIONS}",
            storage=merging.storage,
            ops=merging.ops,
            ray=merging.ray,
            address=merging.address,
            shared_filesystem=merging.shared_filesystem,
        )
        hold = stores.at(place).lock
        run = Run(models, options, evaluating, telling, lambda: stack.enter_context(hold(f"{place}/{LOCK}")))
        stopped = run.run()
        outcome = run.finish()
        points = {point.name: point for point in models.read().points}
    best, parents = outcome.best, outcome.parents
    costs = {name: make_costs(own, options.directions) for name, own in best.items()}
    known = {name: make_costs(own, options.directions) for name, own in parents.items() if own is not None}
    beaten = {name: find_dominators(name, {**known, name: own}) for name, own in costs.items()}
    return SearchReport(
        place,
        tuple(direction.name for direction in options.directions),
        tuple(run.trials),
        tuple(points[name] for name in best),
        tuple(best.values()),
        parents,
        {name: find_dominators(name, {**costs, name: own}) for name, own in known.items()},
        {name: names for name, names in beaten.items() if names},
        stopped,
        time.perf_counter() - start,
        outcome.errors,
    )
