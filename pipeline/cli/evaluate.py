"""The `eval` command."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from typing import Annotated

import typer

from raymerge.pipeline.cli.console import put, say_hint
from raymerge.pipeline.cli.options import MESSAGES, takes_options
from raymerge.pipeline.errors import ConfigError, OutputError
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.messages import listing
from raymerge.pipeline.options import Help

_TASKS = "Tasks"
_LINE = "\n  "


@takes_options
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODELS...", help="A spectrum, or directories, URLs or Hub names.", show_default=False),
    ],
    options: EvaluateOptions,
    task: Annotated[
        list[str] | None, Help("A task file, loss:FILE, lm-eval:TASK or inspect:TASK; may be repeated.", _TASKS, "TASK")
    ] = None,
    command: Annotated[
        list[str] | None,
        Help("Command that prints JSON at its end: 'python eval.py {model}'; may be repeated.", _TASKS, "COMMAND"),
    ] = None,
    only: Annotated[
        list[str] | None, Help("A point or parent of the spectrum; may be repeated.", _TASKS, "NAME", default="all")
    ] = None,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    quiet: Annotated[bool, Help("Print no progress.", MESSAGES, short="q")] = False,
    log_json: Annotated[bool, Help("Print a JSON object for each event, in place of text.", MESSAGES)] = False,
) -> None:
    """Evaluate models: accuracy, tokens, thinking. Run it again to finish; what is finished is not done again."""
    from json import dumps

    from raymerge.pipeline.cli.display.evaluation import EvaluationDisplay, format_table
    from raymerge.pipeline.cli.json_log import open_json_log
    from raymerge.pipeline.evaluation.evaluate import evaluate as run
    from raymerge.pipeline.evaluation.events import format_event
    from raymerge.pipeline.redact import redact_texts

    if log_json and (json or quiet):
        raise ConfigError("--log-json prints everything as JSON, a line for each event; leave --json and -q out")
    tasks = [*(task or ()), *(f"command:{each}" for each in command or ())]
    with open_json_log(verbose=False) if log_json else nullcontext():
        display = EvaluationDisplay(quiet=quiet or json)
        show = (lambda event: put(format_event(event))) if log_json else display.show
        found = run(models, tasks, options, only=only, on_event=show)
        if json:
            put(dumps(redact_texts([asdict(each) for each in found]), indent=1, ensure_ascii=False))
        elif not log_json:
            put(format_table(found))
        failed = [f"{each.model}, {each.task}: {each.error}" for each in found if each.state == "failed"]
        if failed:
            raise OutputError(
                f"{len(failed)} of {len(found)} evaluations failed; fix the cause and run the command again: only"
                f" these are repeated:\n  {listing(failed, 20, separator=_LINE)}"
            )
        if display.has_spectrum:
            place = f" --evaluations {options.out}" if options.out else ""
            say_hint(f"next: `raymerge curve {models[0]}{place}` draws the curve, and chooses a model by a rule")
        elif not (quiet or json or log_json):
            say_hint(f"results are in {options.out or './evaluations'}; --out DIR puts them elsewhere")
