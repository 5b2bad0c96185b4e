"""`raymerge manifest`: a merge as a job of a scheduler, with the options of `raymerge merge` passed on."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymerge import __version__
from raymerge.pipeline.cli.options import Config, RemoteOptions, list_arguments, takes_options
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.options import MergeOptions
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

JOB = "Job"
MACHINES = "Machines"
"""Panels of the help."""

manifest = typer.Typer(no_args_is_help=True, help="Write a merge as a job for a scheduler, with CONFIG in it.")


def _check_line(text: str | None) -> str | None:
    if text is not None and not (text.strip() and text.isprintable()):
        raise typer.BadParameter(f"{text!r} is empty, or has characters that are not printed")
    return text


def _text(help_text: str, metavar: str = "NAME", *, panel: str = JOB, default: str | None = None) -> Any:
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
Image = Annotated[
    str | None, _text("Image of the containers.", "IMAGE", panel=MACHINES, default=f"{_IMAGE}cpu, or -gpu")
]
Attempts = Annotated[
    int,
    typer.Option(min=1, max=10, help="Runs, each going on where one failed.", metavar="N", rich_help_panel=JOB),
]


@dataclass(frozen=True)
class JobOptions:
    """What all kinds of jobs take."""

    name: Annotated[str, _text("Name of the job.")] = "raymerge"
    nodes: Annotated[int, typer.Option(min=1, help="Machines that merge.", metavar="N", rich_help_panel=MACHINES)] = 4
    gpus: Annotated[int, typer.Option(min=0, help="GPUs of each of them.", metavar="N", rich_help_panel=MACHINES)] = 0
    setup: Annotated[
        str | None,
        typer.Option(
            metavar="COMMANDS",
            help="Run on every machine before Ray starts; '' for nothing.",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None
    env: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=VALUE",
            help="Environment of all machines; may be repeated. No secrets.",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None


@dataclass(frozen=True)
class SizeOptions:
    """How large the machines are, and how long they may work, where the scheduler wants to know."""

    cpus: Annotated[int, typer.Option(min=1, help="Cores of each machine.", metavar="N", rich_help_panel=MACHINES)] = 8
    node_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory of each machine.", rich_help_panel=MACHINES)
    ] = "32GiB"
    time: Annotated[str, typer.Option(metavar="H:MM:SS", help="Longest time.", rich_help_panel=JOB)] = "24:00:00"

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


@manifest.command(epilog="Example: raymerge manifest kuberay merge.yml s3://bucket/merged > job.yaml")
@takes_options
def kuberay(
    config: Config,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: RemoteOptions,
    image: Image = None,
    ray_version: Annotated[str, _text("Ray of the image.", "VERSION", panel=MACHINES)] = RAY_VERSION,
    namespace: Annotated[str | None, _text("Namespace of the job.", default="kubectl's")] = None,
    service_account: Annotated[str | None, _text("Account of the pods.", default="the namespace's")] = None,
    env_secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            help="Secret for the pods' environment; may be repeated.",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None,
    attempts: Attempts = 3,
) -> None:
    """A RayJob for Kubernetes with KubeRay 1.5.1 or newer."""
    from raymerge.cluster.manifests.kuberay import KubeRay, make_kuberay

    target = KubeRay(
        image=_image(image, job),
        ray_version=ray_version,
        namespace=namespace,
        service_account=service_account,
        env_secrets=tuple(env_secret or ()),
        num_attempts=attempts,
        num_seconds=size.num_seconds,
    )
    made = _make_job(config, out, job, options, setup=_SETUP, apply="kubectl apply -f FILE", is_spread=True)
    typer.echo(make_kuberay(made, _make_size(size, job, options), target), nl=False)


@manifest.command(epilog="Example: raymerge manifest slurm merge.yml s3://bucket/merged > job.sh")
@takes_options
def slurm(
    config: Config,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: RemoteOptions,
    partition: Annotated[str | None, _text("Partition in which the job runs.", default="the cluster's")] = None,
    account: Annotated[str | None, _text("Account that is charged.", default="the user's")] = None,
) -> None:
    """A script for sbatch. By default raymerge is expected on the PATH of the shell that calls sbatch."""
    from raymerge.cluster.manifests.slurm import Slurm, make_slurm

    target = Slurm(partition=partition, account=account, num_seconds=size.num_seconds)
    made = _make_job(config, out, job, options, setup="", apply="sbatch FILE", is_spread=job.nodes > 1)
    typer.echo(make_slurm(made, _make_size(size, job, options), target), nl=False)


@manifest.command(epilog="Example: raymerge manifest aws-batch merge.yml s3://bucket/merged > job.yaml")
@takes_options
def aws_batch(
    config: Config,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: RemoteOptions,
    image: Image = None,
    job_role: Annotated[str | None, _text("Role of the containers.", "ARN", default="the machines'")] = None,
    execution_role: Annotated[
        str, _text("Role that reads the secrets.", "ARN")
    ] = f"{_ACCOUNT}:role/ecsTaskExecutionRole",
    token_secret: Annotated[str, _text("Where Ray's token is kept.", "ARN|PARAMETER")] = "/raymerge/ray-token",
    env_secret: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=ARN|PARAMETER",
            help="Environment variable from a secret; may be repeated.",
            show_default=False,
            rich_help_panel=JOB,
        ),
    ] = None,
    attempts: Attempts = 3,
) -> None:
    """A job definition for AWS Batch, of several nodes."""
    from raymerge.cluster.manifests.aws_batch import AwsBatch, make_aws_batch

    target = AwsBatch(
        image=_image(image, job),
        job_role=job_role,
        execution_role=execution_role,
        token_secret=token_secret,
        env_secrets=_parse_pairs("--env-secret", env_secret),
        num_attempts=attempts,
        num_seconds=size.num_seconds,
    )
    apply = "aws batch register-job-definition --cli-input-yaml file://FILE"
    made = _make_job(config, out, job, options, setup=_SETUP, apply=apply, is_spread=job.nodes > 1)
    typer.echo(make_aws_batch(made, _make_size(size, job, options), target), nl=False)


@manifest.command(epilog="Example: raymerge manifest ray-up merge.yml s3://bucket/merged > cluster.yaml")
@takes_options
def ray_up(
    config: Config,
    out: Out,
    job: JobOptions,
    options: RemoteOptions,
    image: Image = None,
    region: Annotated[str, _text("Region of AWS.", panel=MACHINES)] = "us-west-2",
    instance_type: Annotated[
        str | None,
        _text("Type of the machines that merge.", "TYPE", panel=MACHINES, default="m5.2xlarge, or g5.2xlarge for GPUs"),
    ] = None,
    instance_profile: Annotated[
        str, _text("Profile of the machines that merge.", panel=MACHINES)
    ] = "ray-autoscaler-v1",
    ami: Annotated[
        str | None, _text("Image of all machines.", "ID", panel=MACHINES, default="Ray's for the region")
    ] = None,
    token_file: Annotated[str, _text("Ray's token, on your machine.", "PATH")] = "~/.ray/auth_token",
) -> None:
    """A cluster on AWS that Ray starts, and stops after the merge."""
    from raymerge.cluster.manifests.ray_up import RayUp, make_ray_up

    target = RayUp(
        image=_image(image, job),
        region=region,
        instance_type=instance_type or ("g5.2xlarge" if job.gpus else "m5.2xlarge"),
        ami=ami,
        instance_profile=instance_profile,
        token_file=token_file,
        num_gpus=job.gpus,
    )
    apply = "ray exec FILE --start --stop 'bash merge.sh'"
    made = _make_job(config, out, job, options, setup=_SETUP, apply=apply, is_spread=True)
    typer.echo(make_ray_up(made, target), nl=False)


def _parse_pairs(option: str, texts: Sequence[str] | None) -> tuple[tuple[str, str], ...]:
    pairs = []
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
            raise typer.BadParameter(f"{text!r} is not of the form NAME=VALUE", param_hint=option)
        pairs.append((name, value))
    return tuple(pairs)


def _make_job(
    config: Config, out: str, job: JobOptions, options: MergeOptions, *, setup: str, apply: str, is_spread: bool
) -> Job:
    """Return the job that the options describe.

    Args:
        config: of the merge.
        out: path or URL of the output.
        job: what all kinds of jobs take.
        options: of the merge.
        setup: what comes before Ray, unless told otherwise.
        apply: the command that runs the job, with FILE in it.
        is_spread: whether several machines take part.

    Raises:
        ConfigError: the config is wrong, or names what is not the same on all machines, or there is a credential.
    """
    from raymerge.cluster.manifests.job import Job
    from raymerge.pipeline.cli.portable import check_portable
    from raymerge.pipeline.config.merge_config import load_config

    loaded = load_config(config, strict=options.strict)
    check_portable(loaded, out, shared_filesystem=options.shared_filesystem)
    if scheme_of(out) == "hf" and is_spread:
        raise ConfigError(
            f"{out}: shards for the Hub are gathered on one machine, and the job has several; merge to a bucket"
        )
    environment = _parse_pairs("--env", job.env)
    before = setup if job.setup is None else job.setup
    for what, text in (("--setup", before), *((f"--env {name}", f"{name}={value}") for name, value in environment)):
        if redact(text) != text:
            raise ConfigError(
                f"{what} has a credential in it, which everybody who may see the manifest could read; name a role, a"
                " service account or a secret instead"
            )
    if options.gpu_memory and not job.gpus:
        raise ConfigError("--gpu-memory is for GPUs, and the job has none; say how many each machine has with --gpus")
    idle = ["--gpus without --gpu-memory: the job is given GPUs, and merges without them"]
    for warning in (*loaded.warnings, *(idle if job.gpus and not options.gpu_memory else ())):
        typer.echo(redact(f"warning: {warning}"), err=True)
    # The run that this one goes on from may be dead, and its lock not yet free.
    arguments = list_arguments(replace(options, wait=True))
    return Job(
        name=job.name,
        config=loaded.text,
        arguments=(out, *arguments),
        setup=before,
        environment=environment,
        num_nodes=job.nodes,
        comment=f"{shlex.join(['raymerge', *sys.argv[1:]])}\n{apply}",
    )


def _make_size(size: SizeOptions, job: JobOptions, options: MergeOptions) -> NodeSize:
    """Return what each machine has.

    Raises:
        ConfigError: a merge with these options needs more memory.
    """
    from raymerge.cluster.manifests.job import NodeSize
    from raymerge.cluster.ray.session import RESERVED_MEM

    made = NodeSize(size.cpus, parse_nbytes(size.node_memory), job.gpus)
    num_workers = options.workers or size.cpus
    needed = options.allowed_mem + num_workers * RESERVED_MEM
    if needed > made.work_nbytes:
        raise ConfigError(
            f"--node-memory {size.node_memory} is too little: --memory {options.memory}, {num_workers} workers"
            f" and Ray need {format_memory(needed + made.mem_nbytes - made.work_nbytes)}; give more, or ask for less"
        )
    return made


def _image(image: str | None, job: JobOptions) -> str:
    return image or f"{_IMAGE}{'gpu' if job.gpus else 'cpu'}"
