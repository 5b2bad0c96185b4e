"""The curve of a spectrum: accuracy against tokens, what it shows, and the model to take."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from pathlib import Path

from raymerge import __version__
from raymerge.pipeline.curve.choice import DEFAULT_POINTS, Rule, choose
from raymerge.pipeline.curve.findings import find
from raymerge.pipeline.curve.pairs import Pairs, SamplePairs
from raymerge.pipeline.curve.records import Records, locate_evaluations, locate_models, read_evaluations, takes_no_files
from raymerge.pipeline.curve.results import Curve
from raymerge.pipeline.curve.series import make_series
from raymerge.pipeline.curve.tasks import Task, choose_tasks, sort_evaluations
from raymerge.pipeline.curve.types import View
from raymerge.pipeline.curve.views import list_models, make_views
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.spectrum.record import Spectrum, read_spectrum
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.settings import Library, StoreSettings

FILES = ("curve.html", "curve.png", "curve.svg", "curve.csv")
"""Files that are written, the page first."""
_LIBRARIES = ("altair", "vl_convert")


def curve(
    spectrum: str | Path,
    *,
    evaluations: str | Path | None = None,
    out: str | Path | None = None,
    task: Sequence[str] = (),
    within: float | None = None,
    best_under_tokens: float | None = None,
    storage: Library = "auto",
) -> Curve:
    """Draw the curve of a spectrum's evaluated models, and choose one by a rule.

    Args:
        spectrum: directory or URL of what `sweep` has made and `evaluate` has evaluated.
        evaluations: directory or URL of the evaluations; by default where `evaluate` keeps those of the spectrum.
        out: directory or URL for curve.html, curve.png, curve.svg and curve.csv; that of the spectrum by default.
        task: the tasks that count; all by default.
        within: choose the fewest tokens among the points that are at most so many percentage points less accurate than
            the better parent.
        best_under_tokens: choose the most accurate point with at most so many tokens.
        storage: what serves object stores and the web.

    Returns:
        What was found. Without a rule, the choice is that of `within=1`, and the best point where tokens or accuracies
        were not measured.

    Raises:
        ConfigError: the rule or a task is not possible, or altair is not installed.
        OutputError: there is no spectrum, or no evaluation of it, or the files cannot be written.
    """
    wanted = _make_rule(within, best_under_tokens)
    _check_libraries()
    with open_stores(StoreSettings(storage)) as stores:
        directory = stores.at(str(spectrum)).absolute(str(spectrum))
        if out is None and takes_no_files(directory):
            raise ConfigError(f"{FILES[0]} cannot be written to {directory}; name another directory as `out`")
        record = read_spectrum(stores, directory)
        place = stores.at(str(evaluations)).absolute(str(evaluations)) if evaluations else ""
        place = place or locate_evaluations(stores, directory)
        records = read_evaluations(stores, place, locate_models(directory, record))
        found = make_curve(directory, record, records, task, wanted, lambda tasks: SamplePairs(stores, place, tasks))
        target = directory if out is None else stores.at(str(out)).absolute(str(out))
        _write(stores, target, found)
    return found


def make_curve(
    directory: str,
    spectrum: Spectrum,
    records: Records,
    task: Sequence[str],
    rule: Rule | None,
    make_pairs: Callable[[Sequence[Task]], Pairs] = lambda tasks: Pairs(),
) -> Curve:
    """Return the curve of a spectrum and its evaluations.

    Args:
        directory: the spectrum's.
        spectrum: its record.
        records: its evaluations.
        task: the tasks that count; all by default.
        rule: by which a model is chosen.
        make_pairs: returns what compares models on the same items of tasks.

    Raises:
        ConfigError: there is no such task, or the rule needs figures that were not measured.
        OutputError: nothing was evaluated.
    """
    tasks, notes = sort_evaluations(records.evaluations)
    if not tasks:
        raise OutputError(
            f"{directory} has no evaluations"
            + (f": {listing(records.damaged)}" if records.damaged else "")
            + f"; `raymerge eval {directory} --task TASK` makes them"
        )
    chosen = choose_tasks(tasks, task)
    models = list_models(directory, spectrum, records.evaluations)
    series = make_series(spectrum.paths, {model.name: model.settings for model in models if model.kind == "point"})
    views = make_views(models, chosen.chosen)
    view = views[0]
    rule, pairs = _fit_rule(view, rule), make_pairs(chosen.chosen)
    return Curve(
        __version__,
        directory,
        models,
        spectrum.paths,
        series,
        views,
        tuple(find(each, models, series, pairs) for each in views),
        rule,
        choose(
            view,
            [model.name for model in models if model.kind == "point"],
            [model.name for model in models if model.kind == "parent"],
            rule,
            pairs,
        ),
        (*notes, *chosen.notes, *records.damaged),
    )


def _make_rule(within: float | None, best_under_tokens: float | None) -> Rule | None:
    """Return the rule that is asked for, if any; raises ConfigError."""
    if within is not None and best_under_tokens is not None:
        raise ConfigError("--within and --best-under-tokens are two rules; choose one")
    if within is not None:
        if not (math.isfinite(within) and within >= 0):
            raise ConfigError(f"--within is {within:g}; a number of percentage points from 0 is needed")
        return Rule("within", within)
    if best_under_tokens is not None:
        if not (math.isfinite(best_under_tokens) and best_under_tokens > 0):
            raise ConfigError(f"--best-under-tokens is {best_under_tokens:g}; a number of tokens above 0 is needed")
        return Rule("best_under_tokens", best_under_tokens)
    return None


def _fit_rule(view: View, rule: Rule | None) -> Rule:
    """Return the rule, or the default one that fits the figures; raises ConfigError."""
    fits = view.measure == "accuracy" and view.has_tokens
    if rule is None:
        return Rule("within", DEFAULT_POINTS) if fits else Rule("best")
    if not fits:
        lacking = "accuracy" if view.measure == "loss" else "tokens"
        raise ConfigError(
            f"the rule `{rule.name}` compares accuracy and tokens, and {view.title!r} has no {lacking};"
            " leave the rule out, which chooses the best point, or name a task that has both"
        )
    return rule


def _check_libraries() -> None:
    missing = [name for name in _LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            f"the curve is drawn by altair and vl-convert-python, and {listing(missing)} is not installed; install it"
            " with `pip install 'raymerge[spectrum]'`"
        )


def _write(stores: Stores, directory: str, found: Curve) -> None:
    from raymerge.pipeline.curve.drawing.page import make_page
    from raymerge.pipeline.curve.drawing.pictures import make_pictures
    from raymerge.pipeline.curve.table import make_csv

    svg, png = make_pictures(found)
    contents = (make_page(found).encode(), png, svg.encode(), make_csv(found).encode())
    for name, content in zip(FILES, contents, strict=True):
        url = f"{directory}/{name}"
        stores.at(url).write(url, content)
