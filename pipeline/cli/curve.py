"""The `curve` command."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from raymerge.pipeline.cli.console import put, say, say_hint
from raymerge.pipeline.cli.options import MESSAGES, takes_options
from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.options import Help, StorageOption

_CHOICE = "Choice"
_OUTPUT = "Output"


@dataclass(frozen=True)
class CurveOptions:
    """The options of `curve`."""

    task: Annotated[
        list[str] | None, Help("Task that counts; may be given several times.", _CHOICE, "TASK", default="all")
    ] = None
    within: Annotated[
        float | None,
        Help(
            "Choose the fewest tokens within so many points of the better parent's accuracy.",
            _CHOICE,
            "POINTS",
            default="1.0",
        ),
    ] = None
    best_under_tokens: Annotated[
        float | None,
        Help("Choose the highest accuracy with at most so many tokens.", _CHOICE, "TOKENS", default="none"),
    ] = None
    save_yaml: Annotated[Path | None, Help("Write the chosen model's YAML.", _OUTPUT, "FILE", default="none")] = None
    evaluations: Annotated[
        str | None,
        Help("Directory or URL of the evaluations.", _OUTPUT, "DIR", default="SPECTRUM/evaluations"),
    ] = None
    out: Annotated[
        str | None,
        Help("Directory or URL for curve.html, .png, .svg and .csv.", _OUTPUT, "OUT", default="that of the spectrum"),
    ] = None
    storage: StorageOption = "auto"


@takes_options
def curve(
    spectrum: Annotated[
        str,
        typer.Argument(metavar="SPECTRUM", help="Directory or URL of a sweep that was evaluated.", show_default=False),
    ],
    options: CurveOptions,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
) -> None:
    """Draw accuracy against tokens of a spectrum's models, and choose the one to take by a rule."""
    from raymerge.pipeline.curve.curve import FILES
    from raymerge.pipeline.curve.curve import curve as draw
    from raymerge.pipeline.curve.report import curve_json, format_curve

    found = draw(
        spectrum,
        evaluations=options.evaluations,
        out=options.out,
        task=options.task or (),
        within=options.within,
        best_under_tokens=options.best_under_tokens,
        storage=options.storage,
    )
    put(curve_json(found) if json else format_curve(found))
    for warning in found.warnings:
        say(f"warning: {warning}")
    if options.save_yaml is not None:
        if found.chosen is None:
            raise OutputError(f"{options.save_yaml} was not written: no point could be chosen")
        try:
            options.save_yaml.write_text(found.chosen.config, encoding="utf-8")
        except OSError as error:
            raise OutputError(f"{options.save_yaml} could not be written: {error.strerror}") from error
    if not json:
        say_hint(f"written to {options.out or spectrum}: {', '.join(FILES)}")
        if options.save_yaml is not None:
            say_hint(f"written: {options.save_yaml}; `raymerge merge {options.save_yaml} OUT` makes the model")
