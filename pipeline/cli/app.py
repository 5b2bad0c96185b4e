"""The `raymerge` command: a thin shell over the public API."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.main import get_command

from raymerge import RaymergeError, __version__
from raymerge.pipeline.cli.advice import advise, describe_mistake, is_in_other_order
from raymerge.pipeline.cli.console import put, say, say_hint
from raymerge.pipeline.cli.curve import curve
from raymerge.pipeline.cli.evaluate import evaluate
from raymerge.pipeline.cli.extract import extract_lora
from raymerge.pipeline.cli.interrupt import watch_for_interrupts
from raymerge.pipeline.cli.jobs import jobs, submit
from raymerge.pipeline.cli.manifest import manifest
from raymerge.pipeline.cli.options import MESSAGES, ConfigFile, Out, PlanOptions, Verbose, takes_options
from raymerge.pipeline.cli.search import search
from raymerge.pipeline.cli.sweep import sweep
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.options import SPEED, Help, MergeOptions, StorageOption
from raymerge.pipeline.redact import redact

if TYPE_CHECKING:
    from raymerge.pipeline.plan.types import MergePlan

# Each command imports what it needs when it runs: --help and --version have to be quick.

_INTERRUPTED = 130
"""typer's exit code for a KeyboardInterrupt."""

commands = typer.Typer(
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def main() -> None:
    """Run the command line; exit with 2 where the user can put it right, with 130 when interrupted."""
    watch_for_interrupts()
    try:
        code = get_command(commands).main(prog_name="raymerge", standalone_mode=False)
        if code == _INTERRUPTED:
            raise KeyboardInterrupt
    except typer.TyperException as error:
        _show_usage(error)
        sys.exit(error.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        from raymerge.pipeline.cli.exits import explain

        failed = explain(error)
        with suppress(OSError):  # the terminal may be gone
            say(failed.text)
        _drop_unwritten()
        sys.exit(failed.exit_code)


def _drop_unwritten() -> None:
    """Leave out what stdout could not take: Python would try again at its end, and say so in its own way."""
    if sys.stdout is None:  # closed from the start
        return
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _show_usage(error: typer.TyperException) -> None:
    """Explain a mistake in the command line, and how to get help."""
    message = describe_mistake(error)
    if not message:  # the help itself has been printed
        return
    context: typer.Context | None = getattr(error, "ctx", None)
    if context is not None:
        say(context.get_usage())
        say_hint(f"Try '{context.command_path} -h' for help.\n")
    advice = advise(error)
    say(f"Error: {error.format_message().removesuffix('.')}; {advice}" if advice else f"Error: {message}")


def _show_version(is_asked: bool) -> None:
    if is_asked:
        put(f"raymerge, version {__version__}")
        raise typer.Exit


@commands.callback()
def _raymerge(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Merge LLM checkpoints: a mergekit YAML in, a Hugging Face checkpoint out."""


@commands.command(epilog="Example: raymerge plan merge.yml s3://bucket/merged --memory 8GiB")
@takes_options
def plan(
    config: ConfigFile,
    options: PlanOptions,
    out: Annotated[
        str | None,
        typer.Argument(
            metavar="OUT", help="Directory or URL of the output; it decides what writing takes.", show_default=False
        ),
    ] = None,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    save: Annotated[Path | None, Help("Write the tensor table as Parquet.", MESSAGES, "FILE")] = None,
    verbose: Verbose = False,
) -> None:
    """Print what a merge will read, do and write, or what is wrong with it. Reads hardly more than headers."""
    from raymerge.pipeline import driver
    from raymerge.pipeline.plan.report import plan_json, save_table

    result = driver.plan(config, options, out=out)
    if save is not None:
        save_table(result, save)
    if json:
        put(plan_json(result))
    else:
        _print_plan(result, verbose=verbose)
    if out is not None:
        try:
            driver.check_output(result, out, storage=options.storage)
        except RaymergeError as error:
            say(redact(f"warning: `raymerge merge` refuses this output: {error}"))


def _print_plan(plan: MergePlan, *, verbose: bool) -> None:
    from raymerge.pipeline.plan.report import format_plan

    put(format_plan(plan, verbose=verbose))
    for warning in plan.warnings:
        say(redact(f"warning: {warning}"))


@commands.command(epilog="Example: raymerge merge merge.yml s3://bucket/merged --memory 8GiB --workers 4")
@takes_options
def merge(
    config: ConfigFile,
    out: Out,
    options: MergeOptions,
    dry_run: Annotated[bool, Help("Plan, look at OUT, print, and stop.", MESSAGES)] = False,
    verbose: Verbose = False,
    quiet: Annotated[bool, Help("Print errors only, and which tensors are not finite.", MESSAGES, short="q")] = False,
    log_json: Annotated[bool, Help("Print a JSON object for each event, in place of text.", MESSAGES)] = False,
) -> None:
    """Merge the models of CONFIG into OUT, a directory or URL; run it again to finish an interrupted merge."""
    from raymerge.pipeline import driver

    if is_in_other_order(config, out):
        raise ConfigError(
            f"{config} is no file, and {out} is one; the config comes first: raymerge merge {out} {config}"
        )
    if dry_run:
        if log_json:
            raise ConfigError("--dry-run does nothing that could be logged; `raymerge plan --json` prints the plan")
        if options.ray or options.address:
            raise ConfigError("--dry-run plans for this machine without Ray; leave the options for Ray out")
        result = driver.plan(config, options, out=out)
        driver.check_output(result, out, overwrite=options.overwrite, storage=options.storage)
        if not quiet:
            _print_plan(result, verbose=verbose)
        return
    if log_json and quiet:
        raise ConfigError("--log-json is for machines, and tells them everything; leave -q out")
    from raymerge.pipeline.cli.display.merge import Display
    from raymerge.pipeline.cli.json_log import open_json_log

    with open_json_log(verbose=verbose) if log_json else Display(verbose=verbose, quiet=quiet) as log:
        driver.merge(config, out, options, on_event=log.show)


@dataclass(frozen=True)
class VerifyOptions:
    """The options of `verify`."""

    workers: Annotated[int, Help("Files read at once.", SPEED, "N", former="threads")] = 2
    storage: StorageOption = "auto"


@commands.command(epilog="Example: raymerge verify s3://bucket/merged --workers 8")
@takes_options
def verify(out: Out, options: VerifyOptions) -> None:
    """Compare every file of a model, or of a spectrum's models, with its checksum, and the index with the shards."""
    from raymerge.pipeline.messages import counted
    from raymerge.pipeline.sizes import format_nbytes
    from raymerge.pipeline.spectrum.verify import verify_all

    for place, report in verify_all(out, workers=options.workers, storage=options.storage):
        put(
            f"{place} is sound: {counted(report.num_files, 'file')}, {counted(report.num_tensors, 'tensor')},"
            f" {format_nbytes(report.nbytes)}"
        )


OwnOpsFile = Annotated[str | None, Help("Python file that declares methods of your own.", MESSAGES, "FILE")]


@commands.command(epilog="Example: raymerge methods ties")
@takes_options
def methods(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="A merge method.", show_default="all")] = None,
    json: Annotated[bool, Help("Print JSON.", MESSAGES)] = False,
    ops: OwnOpsFile = None,
) -> None:
    """List the merge methods, or tell of one what it computes, takes and costs, when to use it, and show a YAML."""
    from raymerge.ops.own import read_own_ops
    from raymerge.ops.registry import find_op, load_ops
    from raymerge.pipeline.cli.methods import format_page, format_table, methods_json

    own = read_own_ops(ops).ops if ops else {}
    chosen = [find_op(name, own)] if name else list({**load_ops(), **own}.values())
    put(methods_json(chosen) if json else format_page(chosen[0]) if name else format_table(chosen))


@commands.command(epilog="Example: raymerge schema > raymerge.schema.json")
@takes_options
def schema(ops: OwnOpsFile = None) -> None:
    """Print a JSON Schema of the YAML, with which editors complete and check it."""
    from json import dumps

    from raymerge.ops.own import read_own_ops
    from raymerge.ops.registry import load_ops
    from raymerge.pipeline.config.schema.schema import make_schema

    own = read_own_ops(ops).ops if ops else {}
    put(dumps(make_schema([*load_ops().values(), *own.values()]), indent=1))


@commands.command(epilog="Example: raymerge inspect Qwen/Qwen2.5-7B-Instruct")
@takes_options
def inspect(
    url: Annotated[
        str,
        typer.Argument(
            metavar="URL", help="A directory, URL, Hub repository or .safetensors file.", show_default=False
        ),
    ],
    tensors: Annotated[bool, Help("Print a line for each tensor.", MESSAGES)] = False,
    json: Annotated[bool, Help("Print JSON, tensors included.", MESSAGES)] = False,
    storage: StorageOption = "auto",
) -> None:
    """Say what a checkpoint consists of: a directory, a URL, a Hub repository or one .safetensors file.

    Reads headers only.
    """
    from raymerge.pipeline.checkpoint.inspection.inspect import inspect as look_at
    from raymerge.pipeline.cli.formats import format_inspection, inspection_json

    found = look_at(url, storage=storage)
    put(inspection_json(found) if json else format_inspection(found, with_tensors=tensors))


commands.command(epilog="Example: raymerge submit merge.yml s3://bucket/merged --address http://head:8265 --follow")(
    submit
)
commands.command(epilog="Example: raymerge curve spectrum/ --within 1.0 --save-yaml best.yml")(curve)
commands.command("extract-lora", epilog="Example: raymerge extract-lora org/tuned org/base ./adapter --rank 32")(
    extract_lora
)
commands.command("eval", epilog="Example: raymerge eval spectrum/ --task arithmetic.yml --samples 8")(evaluate)
commands.command(epilog="Example: raymerge sweep merge.yml spectrum/ --set t=0.1:0.9:0.1")(sweep)
commands.command(epilog="Example: raymerge search recipe.yml best --task arithmetic.yml --budget 40")(search)
commands.add_typer(jobs, name="jobs")
commands.add_typer(manifest, name="manifest")
