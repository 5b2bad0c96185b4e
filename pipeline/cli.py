"""The `raymerge` command: a thin shell over the public API."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import click

from raymerge import RaymergeError, __version__
from raymerge.pipeline.interrupt import MESSAGE, watch_for_interrupts
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import DEFAULT_MEMORY

if TYPE_CHECKING:
    from raymerge.pipeline.types import MergePlan

# Each command imports what it needs when it runs: --help and --version have to be quick.

_F = TypeVar("_F", bound=Callable[..., Any])


def main() -> None:
    """Run the command line; exit with 2 where the user can put it right, with 130 when interrupted."""
    watch_for_interrupts()
    try:
        commands(prog_name="raymerge", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except RaymergeError as error:
        click.echo(f"Error: {error}", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        click.echo(MESSAGE, err=True)
        sys.exit(130)
    except Exception:
        click.echo(redact(traceback.format_exc()), err=True, nl=False)
        sys.exit(1)


_storage_option = click.option(
    "--storage",
    type=click.Choice(["auto", "fsspec"]),
    default="auto",
    show_default=True,
    help="What serves s3://, gs://, az:// and http(s)://.",
)


def _merge_options(command: _F) -> _F:
    """Add the options that plan and merge share."""
    for option in (
        _storage_option,
        click.option(
            "--gpu-memory", metavar="SIZE", help="Merge on GPUs, with so much memory of each. [default: on the CPU]"
        ),
        click.option("--strict", is_flag=True, help="Make doubtful settings errors instead of warnings."),
        click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="For random methods."),
        click.option(
            "--shard-size", metavar="SIZE", help="Largest output file, such as 5GB. [default: by output size]"
        ),
        click.option(
            "--threads", type=click.IntRange(min=1), metavar="N", help="Shards in work at once. [default: cores]"
        ),
        click.option(
            "--memory",
            metavar="SIZE",
            default=DEFAULT_MEMORY,
            show_default=True,
            help="For tensors and scratch of all threads together.",
        ),
    ):
        command = option(command)
    return command


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="raymerge")
def commands() -> None:
    """Merge LLM checkpoints: a mergekit YAML in, a Hugging Face checkpoint out."""


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@_merge_options
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
    from raymerge.pipeline.plan_report import plan_json, save_table

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
    from raymerge.pipeline.plan_report import format_plan

    click.echo(format_plan(plan, verbose=verbose))
    for warning in plan.warnings:
        click.echo(redact(f"warning: {warning}"), err=True)


@commands.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path())
@_merge_options
@click.option(
    "--private/--public", default=True, show_default=True, help="How to make a Hub repository that is not there yet."
)
@click.option("--overwrite", is_flag=True, help="Replace a model that is in OUT.")
@click.option("--ray", is_flag=True, help="Start Ray on this machine, and merge on it.")
@click.option("--address", metavar="HOST:PORT", help="Merge on the Ray cluster whose head is there.")
@click.option("--shared-filesystem", is_flag=True, help="Paths mean the same files on all machines of the cluster.")
@click.option("--dry-run", is_flag=True, help="Plan, look at OUT, print, and stop.")
@click.option("-v", "--verbose", is_flag=True, help="Print a line for each shard.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors only, and which tensors are not finite.")
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
    overwrite: bool,
    ray: bool,
    address: str | None,
    shared_filesystem: bool,
    dry_run: bool,
    verbose: bool,
    quiet: bool,
) -> None:
    """Merge the models of CONFIG into OUT, a directory or URL; run it again to finish an interrupted merge."""
    from raymerge.pipeline import driver

    if dry_run:
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
        driver.check_output(result, out, overwrite=overwrite)
        if not quiet:
            _print_plan(result, verbose=verbose)
        return
    from raymerge.pipeline.display import Display
    from raymerge.pipeline.sizes import format_nbytes

    with Display(verbose=verbose, quiet=quiet) as display:
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
            overwrite=overwrite,
            ray=ray,
            address=address,
            shared_filesystem=shared_filesystem,
            listener=display,
        )
    for name in report.nonfinite:
        click.echo(f"warning: {name}: the output has NaN or infinite values", err=True)
    if quiet:
        return
    if report.was_complete:
        click.echo(f"{out} was complete already: {report.num_tensors} tensors in {report.num_shards} shards")
        return
    click.echo(
        f"{out}: {report.num_tensors} tensors in {report.num_shards} shards; read {format_nbytes(report.read_nbytes)}, "
        f"wrote {format_nbytes(report.written_nbytes)} in {report.seconds:.1f} s; "
        f"peak memory {format_nbytes(report.peak_rss)}"
    )
    if report.faults:
        click.echo("Failures on the way, all got over:")
        for what, count in report.faults:
            click.echo(f"  {count} x {what}")


@commands.command()
@click.argument("out", type=click.Path())
@click.option(
    "--threads", type=click.IntRange(min=1), default=2, show_default=True, metavar="N", help="Files read at once."
)
@_storage_option
def verify(out: str, threads: int, storage: Literal["auto", "fsspec"]) -> None:
    """Compare every file of a merged model with its checksum, and the index with the shards."""
    from raymerge.pipeline.sizes import format_nbytes
    from raymerge.pipeline.verify import verify as check

    report = check(out, threads=threads, storage=storage)
    click.echo(
        f"{out} is sound: {report.num_files} files, {report.num_tensors} tensors, {format_nbytes(report.nbytes)}"
    )


@commands.command()
@click.argument("name", required=False)
def methods(name: str | None) -> None:
    """List the merge methods, or show one with its parameters."""
    from raymerge.ops.registry import find_op, load_ops
    from raymerge.pipeline.method_report import format_method

    for op in [find_op(name)] if name else load_ops().values():
        click.echo(format_method(op))


@commands.command()
@click.argument("url")
@click.option("--tensors", "with_tensors", is_flag=True, help="Print a line for each tensor.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, tensors included.")
@_storage_option
def inspect(url: str, with_tensors: bool, as_json: bool, storage: Literal["auto", "fsspec"]) -> None:
    """Say what a checkpoint consists of: a directory, a URL, a Hub repository or one .safetensors file.

    Reads headers only.
    """
    from raymerge.pipeline.inspection import inspect as look_at
    from raymerge.pipeline.inspection_report import format_inspection, inspection_json

    found = look_at(url, storage=storage)
    click.echo(inspection_json(found) if as_json else format_inspection(found, with_tensors=with_tensors))
