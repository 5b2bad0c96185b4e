"""The `raymerge` command: a thin shell over the public API."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from raymerge import __version__
from raymerge.pipeline.cli.interrupt import watch_for_interrupts
from raymerge.pipeline.cli.jobs import jobs, submit
from raymerge.pipeline.cli.manifest import manifest
from raymerge.pipeline.cli.options import output_options, plan_options, storage_option
from raymerge.pipeline.redact import redact

if TYPE_CHECKING:
    from raymerge.pipeline.plan.types import MergePlan

# Each command imports what it needs when it runs: --help and --version have to be quick.


def main() -> None:
    """Run the command line; exit with 2 where the user can put it right, with 130 when interrupted."""
    watch_for_interrupts()
    try:
        commands(prog_name="raymerge", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (Exception, KeyboardInterrupt) as error:
        from raymerge.pipeline.progress.events import explain

        failed = explain(error)
        click.echo(failed.text, err=True)
        sys.exit(failed.exit_code)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raymerge")
def commands() -> None:
    """Merge LLM checkpoints: a mergekit YAML in, a Hugging Face checkpoint out."""


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@plan_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--save", type=click.Path(path_type=Path), metavar="FILE", help="Write the tensor table as Parquet.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each shard.")
def plan(
    config: Path,
    memory: str,
    threads: int | None,
    shard_size: str | None,
    seed: int,
    gpu_memory: str | None,
    strict: bool,
    storage: Literal["auto", "fsspec"],
    as_json: bool,
    save: Path | None,
    verbose: bool,
) -> None:
    """Say what a merge will read, do and write, or what is wrong with it. Reads headers only."""
    from raymerge.pipeline import driver
    from raymerge.pipeline.plan.report import plan_json, save_table

    result = driver.plan(
        config,
        memory=memory,
        threads=threads,
        shard_size=shard_size,
        seed=seed,
        gpu_memory=gpu_memory,
        strict=strict,
        storage=storage,
    )
    if save is not None:
        save_table(result, save)
    if as_json:
        click.echo(plan_json(result))
        return
    _print_plan(result, verbose=verbose)


def _print_plan(plan: MergePlan, *, verbose: bool) -> None:
    from raymerge.pipeline.plan.report import format_plan

    click.echo(format_plan(plan, verbose=verbose))
    for warning in plan.warnings:
        click.echo(redact(f"warning: {warning}"), err=True)


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path())
@plan_options
@output_options
@click.option("--ray", is_flag=True, help="Start Ray on this machine, and merge on it.")
@click.option(
    "--address", metavar="HOST:PORT", help="Merge on the Ray cluster whose head is there; `auto`: that of this machine."
)
@click.option("--dry-run", is_flag=True, help="Plan, look at OUT, print, and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each shard.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only, and which tensors are not finite.")
@click.option("--log-json", is_flag=True, help="Print a JSON object for each thing that happens, in place of text.")
def merge(
    config: Path,
    out: str,
    memory: str,
    threads: int | None,
    shard_size: str | None,
    seed: int,
    gpu_memory: str | None,
    strict: bool,
    storage: Literal["auto", "fsspec"],
    private: bool,
    wait: bool,
    overwrite: bool,
    ray: bool,
    address: str | None,
    shared_filesystem: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
    log_json: bool,
) -> None:
    """Merge the models of CONFIG into OUT, a directory or URL; run it again to finish an interrupted merge."""
    from raymerge.pipeline import driver

    if dry_run:
        if log_json:
            raise click.UsageError(
                "--dry-run does nothing that could be logged; `raymerge plan --json` prints the plan"
            )
        if ray or address or shared_filesystem:
            raise click.UsageError("--dry-run plans for this machine without Ray; leave the options for Ray out")
        result = driver.plan(
            config,
            memory=memory,
            threads=threads,
            shard_size=shard_size,
            seed=seed,
            gpu_memory=gpu_memory,
            strict=strict,
            storage=storage,
            out=out,
        )
        driver.check_output(result, out, overwrite=overwrite, storage=storage)
        if not quiet:
            _print_plan(result, verbose=verbose)
        return
    if log_json and quiet:
        raise click.UsageError("--log-json is for machines, and tells them everything; leave -q out")
    from raymerge.pipeline.cli.display import Display
    from raymerge.pipeline.cli.json_log import open_json_log

    with open_json_log(verbose=verbose) if log_json else Display(verbose=verbose, quiet=quiet) as narrator:
        report = driver.merge(
            config,
            out,
            memory=memory,
            threads=threads,
            shard_size=shard_size,
            seed=seed,
            gpu_memory=gpu_memory,
            strict=strict,
            storage=storage,
            private=private,
            wait=wait,
            overwrite=overwrite,
            ray=ray,
            address=address,
            shared_filesystem=shared_filesystem,
            listener=narrator,
        )
        narrator.reported(report)


@commands.command()
@click.argument("out", type=click.Path())
@click.option(
    "--threads", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Files read at once."
)
@storage_option
def verify(out: str, threads: int, storage: Literal["auto", "fsspec"]) -> None:
    """Compare every file of a merged model with its checksum, and the index with the shards."""
    from raymerge.pipeline.messages import counted
    from raymerge.pipeline.output.verify import verify as check
    from raymerge.pipeline.sizes import format_nbytes

    report = check(out, threads=threads, storage=storage)
    click.echo(
        f"{out} is sound: {counted(report.num_files, 'file')}, {counted(report.num_tensors, 'tensor')},"
        f" {format_nbytes(report.nbytes)}"
    )


@commands.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the merge methods, or show one with its parameters."""
    from raymerge.ops.registry import find_op, load_ops
    from raymerge.pipeline.cli.method_report import format_method

    for op in [find_op(name)] if name else load_ops().values():
        click.echo(format_method(op))


@commands.command()
@click.argument("url")
@click.option("--tensors", "with_tensors", is_flag=True, help="Print a line for each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, tensors included.")
@storage_option
def inspect(url: str, with_tensors: bool, as_json: bool, storage: Literal["auto", "fsspec"]) -> None:
    """Say what a checkpoint consists of: a directory, a URL, a Hub repository or one .safetensors file.

    Reads headers only.
    """
    from raymerge.pipeline.checkpoint.inspect import inspect as look_at
    from raymerge.pipeline.cli.inspection_report import format_inspection, inspection_json

    found = look_at(url, storage=storage)
    click.echo(inspection_json(found) if as_json else format_inspection(found, with_tensors=with_tensors))


for command in (submit, jobs, manifest):
    commands.add_command(command)
