"""Command-line options that are made of the fields of a dataclass, so that each is written once."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from functools import cache, wraps
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_origin, get_type_hints

import typer

from raymerge.pipeline.messages import flag
from raymerge.pipeline.options import CLUSTER, Help, MergeOptions

_T = TypeVar("_T")

MESSAGES = "Messages"
"""Panel of the options that say what is printed."""


class Preset:
    """Fields that a command does not offer as options: they have these values, or their defaults."""

    def __init__(self, *names: str, **values: Any) -> None:
        self.names = {*names, *values}
        self.values = values


PlanOptions = Annotated[
    MergeOptions,
    Preset("private", "keep_intermediates", "wait", "recheck", "overwrite", "ray", "address", "shared_filesystem"),
]
"""The options of planning."""

RemoteOptions = Annotated[MergeOptions, Preset("ray", "keep_intermediates", address="auto")]
"""The options of a merge that runs on the cluster which it is sent to."""

ManifestOptions = Annotated[MergeOptions, Preset("ray", "ops", "keep_intermediates", address="auto")]
"""The options of a merge that a manifest describes, which holds nothing but the config."""

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="A mergekit YAML file.", show_default=False)]
Out = Annotated[str, typer.Argument(metavar="OUT", help="Directory or URL of the output.", show_default=False)]
Plan = Annotated[
    bool,
    Help("Plan here first. With --no-plan only the cluster has to reach the models.", CLUSTER, opposite="no-plan"),
]
Verbose = Annotated[bool, Help("Print a line for each shard.", MESSAGES, short="v")]
Address = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="The cluster's dashboard, such as http://10.0.0.5:8265."
    ),
]


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """Have a command take an option for each field of every dataclass among its parameters.

    Fields and parameters are annotated with `Help`, or as typer wants it.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {name: hint for name, hint in hints.items() if is_dataclass(_kind(hint))}
    former: dict[str, str] = {}
    parameters: list[Parameter] = []
    for parameter in inspect.signature(command).parameters.values():
        of_group = _list_fields(groups[parameter.name]) if parameter.name in groups else None
        for name, hint, default in of_group or [(parameter.name, hints[parameter.name], parameter.default)]:
            parameters.append(_make_parameter(name, hint, default))
            note = _find_note(hint, Help)
            if note is not None and note.former is not None:
                former[note.former] = name
                parameters.append(_make_parameter(note.former, Annotated[_kind(hint), typer.Option(hidden=True)], None))

    @wraps(command)
    def run(**values: Any) -> None:
        for old, name in former.items():
            given = values.pop(old)
            values[name] = values[name] if given is None else given
        for parameter, hint in groups.items():
            preset = _find_note(hint, Preset)
            taken = {name: values.pop(name) for name, *_ in _list_fields(hint)}
            values[parameter] = _kind(hint)(**taken, **(preset.values if preset else {}))
        command(**values)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]  # functions have it, typeshed does not know
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


def list_arguments(options: MergeOptions) -> list[str]:
    """Return the command-line options of `merge` that have another value than the default."""
    arguments = []
    for name, hint, default in _list_fields(MergeOptions):
        value = getattr(options, name)
        note = _find_note(hint, Help)
        if value == default or note is None:
            continue
        if value is False:
            arguments.append(f"--{note.opposite}")
        else:
            arguments += [flag(name), *([] if value is True else [str(value)])]
    return arguments


def _list_fields(hint: Any) -> list[tuple[str, Any, Any]]:
    """Return name, type and default of the fields of a dataclass that are options."""
    preset = _find_note(hint, Preset)
    hints = _get_hints(_kind(hint))
    return [
        (field.name, hints[field.name], field.default)
        for field in fields(_kind(hint))
        if preset is None or field.name not in preset.names
    ]


@cache
def _get_hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def _make_parameter(name: str, hint: Any, default: Any) -> Parameter:
    """Return a parameter as typer wants it."""
    note = _find_note(hint, Help)
    if note is not None:
        kind = _kind(hint)
        if {str, int} <= set(get_args(kind)):  # a size
            kind = str if default is not None else str | None
        flags = f"{flag(name)}/--{note.opposite}" if note.opposite else flag(name)
        option = typer.Option(
            flags,
            *([f"-{note.short}"] if note.short else []),
            metavar="" if kind is bool else note.metavar,
            help=note.text,
            show_default=note.default or True,
            rich_help_panel=note.panel,
        )
        hint = Annotated[kind, option]
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=hint)


def _kind(hint: Any) -> Any:
    return get_args(hint)[0] if get_origin(hint) is Annotated else hint


def _find_note(hint: Any, kind: type[_T]) -> _T | None:
    notes: Iterator[_T] = (note for note in getattr(hint, "__metadata__", ()) if isinstance(note, kind))
    return next(notes, None)
