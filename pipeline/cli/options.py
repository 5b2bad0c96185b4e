"""The options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from raymerge.pipeline.sizes import DEFAULT_MEMORY

_F = TypeVar("_F", bound=Callable[..., Any])

storage_option = click.option(
    "--storage",
    type=click.Choice(["auto", "fsspec"]),
    default="auto",
    show_default=True,
    help="What serves s3://, gs://, az:// and http(s)://.",
)

address_option = click.option(
    "--address",
    envvar="RAY_API_SERVER_ADDRESS",
    show_envvar=True,
    required=True,
    metavar="URL",
    help="The cluster's dashboard, such as http://10.0.0.5:8265.",
)


def plan_options(command: _F) -> _F:
    """Add the options that planning a merge takes."""
    return _add(
        command,
        storage_option,
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
    )


def output_options(command: _F) -> _F:
    """Add the options that writing a merge takes, wherever it runs."""
    return _add(
        command,
        click.option(
            "--private/--public",
            default=True,
            show_default=True,
            help="How to make a Hub repository that is not there yet.",
        ),
        click.option("--wait", is_flag=True, help="Wait for another run that is writing to OUT to end."),
        click.option("--overwrite", is_flag=True, help="Replace a model that is in OUT."),
        click.option(
            "--shared-filesystem", is_flag=True, help="Paths mean the same files on all machines of the cluster."
        ),
    )


def list_arguments(values: dict[str, Any]) -> list[str]:
    """Return the options of `merge` that give it these values; those that are the default are left out.

    Args:
        values: by parameter; those that are not plan or output options are left out as well.
    """

    @plan_options
    @output_options
    def merge() -> None:
        pass

    command = click.command()(merge)
    arguments = []
    for option in command.params:
        default = option.get_default(click.Context(command))
        value = values.get(str(option.name))
        if value in (None, default):
            continue
        if isinstance(value, bool):
            arguments.append(option.opts[0] if value else option.secondary_opts[0])
        else:
            arguments += [option.opts[0], str(value)]
    return arguments


def _add(command: _F, *options: Callable[[_F], _F]) -> _F:
    for option in options:
        command = option(command)
    return command
