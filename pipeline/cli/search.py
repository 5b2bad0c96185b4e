"""The `search` command."""

from __future__ import annotations

from typing import Annotated

import typer

from raymerge.pipeline.cli.console import put, say_hint
from raymerge.pipeline.cli.options import MESSAGES, Preset, takes_options
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.options import Help, MergeOptions
from raymerge.pipeline.search.options import SearchOptions

_TASKS = "Tasks"
_Merging = Annotated[MergeOptions, Preset("workers", "keep_intermediates", "wait", "recheck", "overwrite")]
_Evaluating = Annotated[
    EvaluateOptions,
    Preset("limit", "seed", "ops", "storage", "out", "eval_results", "ray", "address", "shared_filesystem"),
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
    quiet: Annotated[bool, Help("Print no progress.", MESSAGES, short="q")] = False,
) -> None:
    """Search a recipe's parameters for the best models. Run it again to finish, or with a larger budget to go on."""
    from dataclasses import asdict
    from json import dumps
    from pathlib import Path

    from raymerge.pipeline.cli.display.search import SearchDisplay, format_report
    from raymerge.pipeline.redact import redact_texts
    from raymerge.pipeline.search.search import search as run

    names = [direction.name for direction in options.directions]
    display = SearchDisplay(options.budget, names, quiet=quiet or json)
    tasks = [*(task or ()), *(f"command:{each}" for each in command or ())]
    report = run(
        Path(recipe),
        out,
        tasks,
        options,
        merging=merging,
        evaluating=evaluating,
        on_batch=display.show_batch,
        on_trial=display.show_trial,
        on_retry=display.show_retry,
        on_warning=display.show_warning,
        on_evaluation=display.show_evaluation,
    )
    put(dumps(redact_texts(asdict(report)), indent=1) if json else format_report(report))
    if not (quiet or json):
        say_hint(f"next: `raymerge curve {out}` shows how certain these figures are, and chooses a model by a rule")
