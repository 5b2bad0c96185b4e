"""The `sweep` command."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from raymerge.pipeline.cli.console import put, say, say_hint
from raymerge.pipeline.cli.options import MESSAGES, ConfigFile, Preset, Verbose, takes_options
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.options import OUTPUT, Help, MergeOptions
from raymerge.pipeline.redact import redact

SweepOptions = Annotated[MergeOptions, Preset("keep_intermediates")]
"""The options of a sweep."""


@takes_options
def sweep(
    config: ConfigFile,
    out: Annotated[str, typer.Argument(metavar="OUT", help="Directory or URL of the spectrum.", show_default=False)],
    options: SweepOptions,
    set: Annotated[  # noqa: A002 - the option's name
        list[str] | None,
        typer.Option(
            metavar="PATH=VALUES",
            help="Values of a place in CONFIG: t=0.1:0.9:0.1, weight[1]=0.4,0.6; several make a grid.",
            rich_help_panel=OUTPUT,
            show_default="CONFIG's sweep: section",
        ),
    ] = None,
    materialize: Annotated[
        Literal["all", "none"], Help("Make the models, or only plan them: each is made when it is needed.", OUTPUT)
    ] = "all",
    dry_run: Annotated[bool, Help("Plan, look at OUT, print, and stop.", MESSAGES)] = False,
    verbose: Verbose = False,
    quiet: Annotated[bool, Help("Print errors only, and which tensors are not finite.", MESSAGES, short="q")] = False,
    log_json: Annotated[bool, Help("Print a JSON object for each event, in place of text.", MESSAGES)] = False,
) -> None:
    """Make many models of one recipe, reading its inputs once: a grid of values, or the points that CONFIG names.

    Run it again to finish an interrupted sweep, or with other values to add points to it.
    """
    from raymerge.pipeline.spectrum import sweep as driver
    from raymerge.pipeline.spectrum.report import format_sweep

    if log_json and (quiet or dry_run):
        raise ConfigError("--log-json is for machines, and tells what is done; leave -q and --dry-run out")
    if dry_run:
        planned = driver.plan_sweep(config, out, set or (), options)
        if not quiet:
            put(format_sweep(planned, makes_models=materialize == "all", verbose=verbose))
            for warning in planned.warnings:
                say(redact(f"warning: {warning}"))
        return
    from raymerge.pipeline.cli.display.merge import Display
    from raymerge.pipeline.cli.json_log import open_json_log

    with open_json_log(verbose=verbose) if log_json else Display(verbose=verbose, quiet=quiet) as log:
        driver.sweep(config, out, set or (), options, materialize=materialize, on_event=log.show)
    if not (quiet or log_json):
        say_hint(f"next: `raymerge eval {out} --task TASK` compares the models, and their parents")
