"""Options of `raymerge manifest`: the job, its machines, and where these get raymerge."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymerge import __version__
from raymerge.pipeline.cli.options import Plan
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.options import Help, MergeOptions
from raymerge.pipeline.sizes import format_memory, parse_nbytes
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.manifests.job import NodeSize, Wheel

RAY_VERSION = "2.60.0"
"""Version of Ray in the default image."""

_IMAGE = f"rayproject/ray:{RAY_VERSION}-py311-"
WHEEL = f"raymerge-{__version__}-py3-none-any.whl"

JOB = "Job"
MACHINES = "Machines"
"""Panels of the help."""


def _check_line(text: str | None) -> str | None:
    if text is not None and not (text.strip() and text.isprintable()):
        raise typer.BadParameter(f"{text!r} is empty, or has characters that are not printed")
    return text


def text_option(help_text: str, metavar: str = "NAME", *, panel: str = JOB, default: str | None = None) -> Any:
    """Return an option that takes one line; `default` says what applies where it is not given."""
    return typer.Option(
        metavar=metavar,
        help=help_text,
        show_default=default or True,
        callback=_check_line,
        rich_help_panel=panel,
    )


Out = Annotated[
    str, typer.Argument(metavar="OUT", help="Directory or URL of the output.", show_default=False, callback=_check_line)
]
Attempts = Annotated[
    int,
    typer.Option(min=1, max=10, help="Runs, each going on where one failed.", metavar="N", rich_help_panel=JOB),
]


@dataclass(frozen=True)
class JobOptions:
    """Options of every kind of job."""

    name: Annotated[str, text_option("Name of the job.")] = "raymerge"
    nodes: Annotated[int, typer.Option(min=1, help="Machines that merge.", metavar="N", rich_help_panel=MACHINES)] = 4
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each of them.", metavar="N", rich_help_panel=MACHINES)] = 0
    setup: Annotated[str | None, Help("Run on every machine before Ray starts.", JOB, "COMMANDS")] = None
    env: Annotated[
        list[str] | None, Help("Environment of all machines; may be repeated. No secrets.", JOB, "NAME=VALUE")
    ] = None
    plan: Plan = True


@dataclass(frozen=True)
class SoftwareOptions:
    """Options that say where containers get raymerge."""

    image: Annotated[
        str | None,
        text_option("Image of the containers.", "IMAGE", panel=MACHINES, default=f"with --wheel {_IMAGE}cpu, or -gpu"),
    ] = None
    wheel: Annotated[
        str | None,
        text_option("Wheel of raymerge that the machines install (`make wheel`).", "URL|FILE", panel=MACHINES),
    ] = None


@dataclass(frozen=True)
class SizeOptions:
    """Size of the machines and time limit, for schedulers that ask for them."""

    cpus: Annotated[int, typer.Option(min=1, help="Cores of each machine.", metavar="N", rich_help_panel=MACHINES)] = 8
    node_memory: Annotated[str, Help("Memory of each machine.", MACHINES, "SIZE")] = "32GiB"
    time: Annotated[str, Help("Longest time.", JOB, "H:MM:SS")] = "24:00:00"

    @property
    def num_seconds(self) -> int:
        """`time` in seconds."""
        match = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", self.time)
        parts = match.groups() if match else ()
        seconds = sum(int(part) * unit for part, unit in zip(parts, (3600, 60, 1), strict=False))
        if seconds < 60:
            raise typer.BadParameter(
                f"{self.time!r} is not a time of a minute or more; write hours:minutes:seconds", param_hint="--time"
            )
        return seconds


def parse_pairs(option: str, texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    """Return the names and values that an option of the form NAME=VALUE has been given."""
    pairs = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint=option)
        pairs.append((name, value))
    return tuple(pairs)


def make_size(size: SizeOptions, job: JobOptions, options: MergeOptions) -> NodeSize:
    """Return the size of each machine.

    Raises:
        ConfigError: a merge with these options needs more memory.
    """
    from raymerge.cluster.manifests.job import NodeSize
    from raymerge.cluster.ray.session import RESERVED_MEM

    made = NodeSize(size.cpus, parse_nbytes(size.node_memory), job.gpus)
    num_workers = options.workers or size.cpus
    needed = options.allowed_mem + num_workers * RESERVED_MEM
    if needed > made.work_nbytes:
        total = format_memory(needed + made.mem_nbytes - made.work_nbytes)
        raise ConfigError(
            f"--node-memory {size.node_memory} is too little: --memory {options.memory},"
            f" {counted(num_workers, 'worker')} and Ray need {total}; give more, or ask for less"
        )
    return made


def find_image(software: SoftwareOptions, job: JobOptions) -> str:
    """Return the image of the containers; Ray's own where only a wheel is given."""
    return software.image or f"{_IMAGE}{'gpu' if job.gpus else 'cpu'}"


def find_wheel(software: SoftwareOptions, job: JobOptions) -> Wheel | None:
    """Return the wheel that the machines install, or None.

    Raises:
        ConfigError: nothing says where the machines get raymerge, or there is no such wheel.
    """
    from raymerge.cluster.manifests.job import Wheel

    if software.wheel is None:
        if software.image is None and not job.setup:
            raise ConfigError(
                "the machines need raymerge: name an image that has it with --image, or a wheel with --wheel, as"
                f" `make wheel` builds it: dist/{WHEEL}"
            )
        return None
    source, scheme = software.wheel, scheme_of(software.wheel)
    if scheme not in ("file", "https", "http"):
        raise ConfigError(f"--wheel {source}: pip fetches https:// and http:// only; give such a URL, or a file")
    wheel = Wheel(source, None if scheme != "file" else b"")
    if wheel.name != WHEEL:
        raise ConfigError(f"--wheel {source} is not {WHEEL}, as `make wheel` builds it from this version")
    if scheme != "file":
        return wheel
    try:
        return Wheel(str(Path(source).absolute()), Path(source).read_bytes())
    except OSError as error:
        raise ConfigError(f"--wheel {source}: {error.strerror}; `make wheel` builds it: dist/{WHEEL}") from None
