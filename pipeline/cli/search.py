"""The `search` command."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from raymerge.pipeline.cli.console import put, say
from raymerge.pipeline.cli.options import MESSAGES, Preset, takes_options
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.options import Help, MergeOptions
from raymerge.pipeline.search.options import SearchOptions

if TYPE_CHECKING:
    from raymerge.pipeline.search.record import Trial
    from raymerge.pipeline.search.results import SearchReport

_TASKS = "Tasks"
_Merging = Annotated[MergeOptions, Preset("keep_intermediates", "wait", "recheck", "overwrite")]
_Evaluating = Annotated[
    EvaluateOptions,
    Preset("limit", "seed", "workers", "ops", "storage", "out", "eval_results", "address", "shared_filesystem"),
]


@takes_options
def search(
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A mergekit YAML file with a `search:` section.", show_default=False)
    ],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory or URL of the best models.", show_default=False)],
    options: SearchOptions,
    merging: _Merging,
    evaluating: _Evaluating,
    task: Annotated[list[str] | None, Help("As of `raymerge eval`; may be repeated.", _TASKS, "TASK")] = None,
    command: Annotated[list[str] | None, Help("As of `raymerge eval`; may be repeated.", _TASKS, "COMMAND")] = None,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    quiet: Annotated[bool, Help("Print no line for each trial.", MESSAGES, short="q")] = False,
) -> None:
    """Search a recipe's parameters for the best models. Run it again to finish, or with a larger budget to go on."""
    from dataclasses import asdict
    from json import dumps
    from pathlib import Path

    from raymerge.pipeline.redact import redact_texts
    from raymerge.pipeline.search.search import search as run

    names = [direction.name for direction in options.directions]

    def show(trial: Trial, number: int) -> None:
        if not quiet and not json:
            say(f"[{number}/{options.budget}] {_format_trial(trial, names)}")

    tasks = [*(task or ()), *(f"command:{each}" for each in command or ())]
    report = run(Path(recipe), out, tasks, options, merging=merging, evaluating=evaluating, on_trial=show)
    put(dumps(redact_texts(asdict(report)), indent=1) if json else _format_report(report))


def _format_trial(trial: Trial, names: list[str]) -> str:
    from raymerge.pipeline.search.display import format_settings, format_values

    came = f"failed: {trial.error}" if trial.values is None else format_values(names, trial.values)
    same = f"  (the same model as {trial.same_as})" if trial.same_as else ""
    return f"{trial.name}  {format_settings(trial.settings)}  {came}{same}"


def _format_report(report: SearchReport) -> str:
    from raymerge.pipeline.messages import counted
    from raymerge.pipeline.search.display import format_settings, format_values
    from raymerge.pipeline.sizes import format_seconds

    lines = [
        f"{report.out}: {counted(len(report.trials), 'trial')} in {format_seconds(report.seconds)}"
        + (f"; {report.stopped}" if report.stopped else ""),
        f"{counted(len(report.best), 'model')} that no other is better than:",
    ]
    for point, values in zip(report.best, report.values, strict=True):
        found = format_values(list(report.objectives), values)
        lines.append(f"  {point.name}  {format_settings(point.settings)}  {found}")
    return "\n".join(lines)
