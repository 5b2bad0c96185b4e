"""`raymerge manifest`: a merge as a job of a scheduler, with the options of `raymerge merge` passed on."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from raymerge import __version__
from raymerge.pipeline.cli.options import list_arguments, output_options, plan_options
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_memory, parse_nbytes
from raymerge.pipeline.urls import scheme_of

if TYPE_CHECKING:
    from raymerge.cluster.manifests.job import Job, NodeSize

RAY_VERSION = "2.60.0"
"""In the default image."""

_IMAGE = f"rayproject/ray:{RAY_VERSION}-py311-"
_SETUP = f"pip install --quiet 'raymerge[ray]=={__version__}'"
_ACCOUNT = "arn:aws:iam::123456789012"
"""What AWS's own examples have; everybody has another one."""
_TYPED = f"{__name__}.typed"
"""Where a command's context has the arguments as they were typed."""

_F = TypeVar("_F", bound=Callable[..., Any])


@click.group()
def manifest() -> None:
    """Write a merge as a job for a scheduler, with CONFIG in it."""


class _Command(click.Command):
    """Keeps its arguments as they were typed."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Parse the arguments, as click does."""
        context.meta[_TYPED] = tuple(arguments)
        return super().parse_args(context, arguments)


def _options(*options: Callable[[_F], _F]) -> Callable[[_F], _F]:
    def add(command: _F) -> _F:
        for option in reversed(options):
            command = option(command)
        return command

    return add


def _parse_seconds(context: click.Context, parameter: click.Parameter, text: str) -> int:
    match = re.fullmatch(r"(\d{1,4}):([0-5]\d):([0-5]\d)", text)
    seconds = sum(int(part) * unit for part, unit in zip(match.groups(), (3600, 60, 1), strict=True)) if match else 0
    if seconds < 60:
        raise click.BadParameter(f"{text!r} is not a time of a minute or more; write hours:minutes:seconds", context)
    return seconds


def _parse_pairs(
    context: click.Context, parameter: click.Parameter, values: Sequence[str]
) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise click.BadParameter(f"{text!r} is not of the form NAME=VALUE", context)
        pairs.append((name, value))
    return tuple(pairs)


def _check_line(context: click.Context, parameter: click.Parameter, text: str | None) -> str | None:
    if text is not None and not (text.strip() and text.isprintable()):
        raise click.BadParameter(f"{text!r} is empty, or has characters that are not printed", context)
    return text


def _text(name: str, help_text: str, default: str | None = None, metavar: str = "NAME") -> Callable[[_F], _F]:
    return click.option(
        name, metavar=metavar, default=default, show_default=default is not None, callback=_check_line, help=help_text
    )


_job_options = _options(
    click.argument("config", type=click.Path(path_type=Path)),
    click.argument("out", callback=_check_line),
    _text("--name", "Of the job.", "raymerge"),
    click.option("--nodes", type=click.IntRange(min=1), default=4, show_default=True, help="Machines that merge."),
    click.option("--gpus", type=click.IntRange(min=0), default=0, show_default=True, help="Of each of them."),
    click.option("--setup", metavar="COMMANDS", help="Run on every machine before Ray starts; '' for nothing."),
    click.option(
        "--env",
        multiple=True,
        metavar="NAME=VALUE",
        callback=_parse_pairs,
        help="Environment of all machines; may be repeated. No secrets.",
    ),
)

_size_options = _options(
    click.option("--cpus", type=click.IntRange(min=1), default=8, show_default=True, help="Of each machine."),
    click.option("--node-memory", metavar="SIZE", default="32GiB", show_default=True, help="Of each machine."),
    click.option(
        "--time", metavar="H:MM:SS", default="24:00:00", show_default=True, callback=_parse_seconds, help="At most."
    ),
)

_image_option = _text("--image", f"Of the containers.  [default: {_IMAGE}cpu, or -gpu]", metavar="IMAGE")

_attempts_option = click.option(
    "--attempts", type=click.IntRange(1, 10), default=3, show_default=True, help="Runs, each going on where one failed."
)


@manifest.command("kuberay", cls=_Command)
@_job_options
@_size_options
@_image_option
@_text("--ray-version", "Of the image.", RAY_VERSION, metavar="VERSION")
@_text("--namespace", "Of the job.  [default: kubectl's]")
@_text("--service-account", "Of the pods.  [default: the namespace's]")
@click.option("--env-secret", multiple=True, metavar="NAME", help="Secret for the pods' environment; may be repeated.")
@_attempts_option
@plan_options
@output_options
@click.pass_context
def _kuberay(context: click.Context, /, **options: Any) -> None:
    """A RayJob for Kubernetes with KubeRay 1.5.1 or newer."""
    from raymerge.cluster.manifests.kuberay import KubeRay, make_kuberay

    job = _make_job(context, setup=_SETUP, apply="kubectl apply -f FILE", is_spread=True)
    target = KubeRay(
        image=_image(options),
        ray_version=options["ray_version"],
        namespace=options["namespace"],
        service_account=options["service_account"],
        env_secrets=options["env_secret"],
        num_attempts=options["attempts"],
        num_seconds=options["time"],
    )
    click.echo(make_kuberay(job, _make_size(options), target), nl=False)


@manifest.command("slurm", cls=_Command)
@_job_options
@_size_options
@_text("--partition", "Where the job runs.  [default: the cluster's]")
@_text("--account", "Who is charged.  [default: the user's]")
@plan_options
@output_options
@click.pass_context
def _slurm(context: click.Context, /, **options: Any) -> None:
    """A script for sbatch. By default raymerge is expected on the PATH of the shell that calls sbatch."""
    from raymerge.cluster.manifests.slurm import Slurm, make_slurm

    job = _make_job(context, setup="", apply="sbatch FILE", is_spread=options["nodes"] > 1)
    target = Slurm(partition=options["partition"], account=options["account"], num_seconds=options["time"])
    click.echo(make_slurm(job, _make_size(options), target), nl=False)


@manifest.command("aws-batch", cls=_Command)
@_job_options
@_size_options
@_image_option
@_text("--job-role", "Role of the containers.  [default: the machines']", metavar="ARN")
@_text("--execution-role", "Role that reads the secrets.", f"{_ACCOUNT}:role/ecsTaskExecutionRole", metavar="ARN")
@_text("--token-secret", "Where Ray's token is kept.", "/raymerge/ray-token", metavar="ARN|PARAMETER")
@click.option(
    "--env-secret",
    multiple=True,
    metavar="NAME=ARN|PARAMETER",
    callback=_parse_pairs,
    help="Environment variable from a secret; may be repeated.",
)
@_attempts_option
@plan_options
@output_options
@click.pass_context
def _aws_batch(context: click.Context, /, **options: Any) -> None:
    """A job definition for AWS Batch, of several nodes."""
    from raymerge.cluster.manifests.aws_batch import AwsBatch, make_aws_batch

    apply = "aws batch register-job-definition --cli-input-yaml file://FILE"
    job = _make_job(context, setup=_SETUP, apply=apply, is_spread=options["nodes"] > 1)
    target = AwsBatch(
        image=_image(options),
        job_role=options["job_role"],
        execution_role=options["execution_role"],
        token_secret=options["token_secret"],
        env_secrets=options["env_secret"],
        num_attempts=options["attempts"],
        num_seconds=options["time"],
    )
    click.echo(make_aws_batch(job, _make_size(options), target), nl=False)


@manifest.command("ray-up", cls=_Command)
@_job_options
@_image_option
@_text("--region", "Of AWS.", "us-west-2")
@_text("--instance-type", "Of the machines that merge.  [default: m5.2xlarge, or g5.2xlarge for GPUs]", metavar="TYPE")
@_text("--instance-profile", "Of the machines that merge.", "ray-autoscaler-v1")
@_text("--ami", "Of all machines.  [default: Ray's for the region]", metavar="ID")
@_text("--token-file", "Ray's token, on your machine.", "~/.ray/auth_token", metavar="PATH")
@plan_options
@output_options
@click.pass_context
def _ray_up(context: click.Context, /, **options: Any) -> None:
    """A cluster on AWS that Ray starts, and stops after the merge."""
    from raymerge.cluster.manifests.ray_up import RayUp, make_ray_up

    apply = "ray exec FILE --start --stop 'bash merge.sh'"
    job = _make_job(context, setup=_SETUP, apply=apply, is_spread=True)
    target = RayUp(
        image=_image(options),
        region=options["region"],
        instance_type=options["instance_type"] or ("g5.2xlarge" if options["gpus"] else "m5.2xlarge"),
        ami=options["ami"],
        instance_profile=options["instance_profile"],
        token_file=options["token_file"],
        num_gpus=options["gpus"],
    )
    click.echo(make_ray_up(job, target), nl=False)


def _make_job(context: click.Context, *, setup: str, apply: str, is_spread: bool) -> Job:
    """Return the job that the options describe.

    Args:
        context: of the command.
        setup: what comes before Ray, unless told otherwise.
        apply: the command that runs the job, with FILE in it.
        is_spread: whether several machines take part.

    Raises:
        ConfigError: the config is wrong, or names what is not the same on all machines, or there is a credential.
    """
    from raymerge.cluster.manifests.job import Job
    from raymerge.pipeline.cli.travel import check_travels
    from raymerge.pipeline.config.merge_config import load_config

    options = context.params
    out: str = options["out"]
    config = load_config(options["config"], strict=options["strict"])
    check_travels(config, out, shared_filesystem=options["shared_filesystem"])
    if scheme_of(out) == "hf" and is_spread:
        raise ConfigError(
            f"{out}: shards for the Hub are gathered on one machine, and the job has several; merge to a bucket"
        )
    environment: tuple[tuple[str, str], ...] = options["env"]
    before = setup if options["setup"] is None else options["setup"]
    for what, text in (("--setup", before), *((f"--env {name}", f"{name}={value}") for name, value in environment)):
        if redact(text) != text:
            raise ConfigError(
                f"{what} has a credential in it, which everybody who may see the manifest could read; name a role, a"
                " service account or a secret instead"
            )
    if options["gpu_memory"] and not options["gpus"]:
        raise ConfigError("--gpu-memory is for GPUs, and the job has none; say how many each machine has with --gpus")
    idle = ["--gpus without --gpu-memory: the job is given GPUs, and merges without them"]
    for warning in (*config.warnings, *(idle if options["gpus"] and not options["gpu_memory"] else ())):
        click.echo(redact(f"warning: {warning}"), err=True)
    # The run that this one goes on from may be dead, and its lock not yet free.
    arguments = list_arguments({**options, "wait": True})
    return Job(
        name=options["name"],
        config=config.text,
        arguments=(out, "--address", "auto", *arguments),
        setup=before,
        environment=environment,
        num_nodes=options["nodes"],
        comment=f"{shlex.join(['raymerge', 'manifest', str(context.info_name), *context.meta[_TYPED]])}\n{apply}",
    )


def _make_size(options: dict[str, Any]) -> NodeSize:
    """Return what each machine has.

    Raises:
        ConfigError: a merge with these options needs more memory.
    """
    from raymerge.cluster.manifests.job import NodeSize
    from raymerge.cluster.ray.session import RESERVED_MEM

    size = NodeSize(options["cpus"], parse_nbytes(options["node_memory"]), options["gpus"])
    num_threads: int = options["threads"] or size.num_cpus
    needed = parse_nbytes(options["memory"]) + num_threads * RESERVED_MEM
    if needed > size.work_nbytes:
        raise ConfigError(
            f"--node-memory {options['node_memory']} is too little: --memory {options['memory']}, {num_threads} workers"
            f" and Ray need {format_memory(needed + size.mem_nbytes - size.work_nbytes)}; give more, or ask for less"
        )
    return size


def _image(options: dict[str, Any]) -> str:
    return options["image"] or f"{_IMAGE}{'gpu' if options['gpus'] else 'cpu'}"
