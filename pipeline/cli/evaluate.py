"""The `eval` command."""

from __future__ import annotations

from typing import Annotated

import typer

from raymerge.pipeline.cli.console import put
from raymerge.pipeline.cli.options import MESSAGES, takes_options
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.evaluation.options import EvaluateOptions
from raymerge.pipeline.options import Help

_TASKS = "Tasks"


@takes_options
def evaluate(
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODELS...", help="A spectrum, or directories, URLs or Hub names.", show_default=False),
    ],
    options: EvaluateOptions,
    task: Annotated[list[str] | None, Help("A task file, or loss:FILE; may be repeated.", _TASKS, "TASK")] = None,
    command: Annotated[
        list[str] | None,
        Help("Command that prints JSON at its end: 'python eval.py {model}'; may be repeated.", _TASKS, "COMMAND"),
    ] = None,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    quiet: Annotated[bool, Help("Print no progress.", MESSAGES, short="q")] = False,
) -> None:
    """Evaluate models: accuracy, tokens, thinking. Run it again to finish; what is finished is not done again."""
    from json import dumps

    from raymerge.pipeline.cli.evaluation_display import EvaluationDisplay, format_table
    from raymerge.pipeline.evaluation.evaluate import evaluate as run

    display = EvaluationDisplay(quiet=quiet or json)
    found = run(models, [*(task or ()), *(f"command:{each}" for each in command or ())], options, on_event=display.show)
    put(dumps([json_of(each) for each in found], indent=1, ensure_ascii=False) if json else format_table(found))
    failed = [each for each in found if each.state == "failed"]
    if failed:
        raise OutputError(
            f"{len(failed)} of {len(found)} evaluations failed; put it right and run again, which does these only:\n"
            + "\n".join(f"  {each.model}, {each.task}: {each.error}" for each in failed)
        )


def json_of(evaluation: object) -> object:
    """Return an evaluation as plain JSON."""
    from dataclasses import asdict
    from typing import Any, cast

    from raymerge.pipeline.redact import redact_texts

    return redact_texts(asdict(cast(Any, evaluation)))
