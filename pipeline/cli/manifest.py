"""`raymerge manifest`: a merge as a job of a scheduler, with the options of `raymerge merge` passed on."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raymerge.pipeline.cli.console import say
from raymerge.pipeline.cli.job_options import (
    JOB,
    MACHINES,
    RAY_VERSION,
    WHEEL,
    Attempts,
    JobOptions,
    Out,
    SizeOptions,
    SoftwareOptions,
    find_image,
    find_wheel,
    make_size,
    parse_pairs,
    text_option,
)
from raymerge.pipeline.cli.options import ConfigFile, ManifestOptions, list_arguments, takes_options
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.options import Help, MergeOptions
from raymerge.pipeline.redact import redact
from raymerge.pipeline.urls import repository_of

if TYPE_CHECKING:
    from raymerge.cluster.manifests.job import Job

manifest = typer.Typer(no_args_is_help=True, help="Write a merge as a job for a scheduler, with CONFIG in it.")


@manifest.command(
    epilog=f"Example: raymerge manifest kuberay merge.yml s3://bucket/merged --wheel dist/{WHEEL} > job.yaml"
)
@takes_options
def kuberay(
    config: ConfigFile,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: ManifestOptions,
    software: SoftwareOptions,
    ray_version: Annotated[str, text_option("Ray of the image.", "VERSION", panel=MACHINES)] = RAY_VERSION,
    namespace: Annotated[str | None, text_option("Namespace of the job.", default="kubectl's")] = None,
    service_account: Annotated[str | None, text_option("Account of the pods.", default="the namespace's")] = None,
    env_secret: Annotated[
        list[str] | None, Help("Secret for the pods' environment; may be repeated.", JOB, "NAME")
    ] = None,
    attempts: Attempts = 3,
) -> None:
    """A RayJob for Kubernetes with KubeRay 1.5.1 or newer."""
    from raymerge.cluster.manifests.kuberay import KubeRay, make_kuberay

    target = KubeRay(
        image=find_image(software, job),
        ray_version=ray_version,
        namespace=namespace,
        service_account=service_account,
        env_secret=tuple(env_secret or ()),
        num_attempts=attempts,
        num_seconds=size.num_seconds,
    )
    apply = "kubectl apply --server-side -f FILE"
    made = _make_job(config, out, job, options, software, apply=apply, is_spread=True)
    _print(partial(make_kuberay, made, make_size(size, job, options), target))


@manifest.command(epilog="Example: raymerge manifest slurm merge.yml s3://bucket/merged > job.sh")
@takes_options
def slurm(
    config: ConfigFile,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: ManifestOptions,
    partition: Annotated[str | None, text_option("Partition in which the job runs.", default="the cluster's")] = None,
    account: Annotated[str | None, text_option("Account that is charged.", default="the user's")] = None,
) -> None:
    """A script for sbatch. By default raymerge is expected on the PATH of the shell that calls sbatch."""
    from raymerge.cluster.manifests.slurm import Slurm, make_slurm

    target = Slurm(partition=partition, account=account, num_seconds=size.num_seconds)
    made = _make_job(config, out, job, options, apply="sbatch FILE", is_spread=job.nodes > 1)
    _print(partial(make_slurm, made, make_size(size, job, options), target))


@manifest.command(
    epilog="Example: raymerge manifest aws-batch merge.yml s3://bucket/merged --image IMAGE --execution-role ARN"
)
@takes_options
def aws_batch(
    config: ConfigFile,
    out: Out,
    job: JobOptions,
    size: SizeOptions,
    options: ManifestOptions,
    software: SoftwareOptions,
    execution_role: Annotated[str, text_option("Role that reads the secrets.", "ARN")],
    job_role: Annotated[str | None, text_option("Role of the containers.", "ARN", default="the machines'")] = None,
    token_secret: Annotated[str, text_option("Where Ray's token is kept.", "ARN|PARAMETER")] = "/raymerge/ray-token",
    env_secret: Annotated[
        list[str] | None,
        Help("Environment variable from a secret; may be repeated.", JOB, "NAME=ARN|PARAMETER"),
    ] = None,
    attempts: Attempts = 3,
) -> None:
    """A job definition for AWS Batch, of several nodes."""
    from raymerge.cluster.manifests.aws_batch import AwsBatch, make_aws_batch

    target = AwsBatch(
        image=find_image(software, job),
        job_role=job_role,
        execution_role=execution_role,
        token_secret=token_secret,
        env_secret=parse_pairs("--env-secret", env_secret),
        num_attempts=attempts,
        num_seconds=size.num_seconds,
    )
    apply = "aws batch register-job-definition --cli-input-yaml file://FILE"
    made = _make_job(config, out, job, options, software, apply=apply, is_spread=job.nodes > 1)
    _print(partial(make_aws_batch, made, make_size(size, job, options), target))


@manifest.command(
    epilog=f"Example: raymerge manifest ray-up merge.yml s3://bucket/merged --wheel dist/{WHEEL} > cluster.yaml"
)
@takes_options
def ray_up(
    config: ConfigFile,
    out: Out,
    job: JobOptions,
    options: ManifestOptions,
    software: SoftwareOptions,
    region: Annotated[str, text_option("Region of AWS.", panel=MACHINES)] = "us-west-2",
    instance_type: Annotated[
        str | None,
        text_option(
            "Type of the machines that merge.", "TYPE", panel=MACHINES, default="m5.2xlarge, or g5.2xlarge for GPUs"
        ),
    ] = None,
    instance_profile: Annotated[
        str, text_option("Profile of the machines that merge.", panel=MACHINES)
    ] = "ray-autoscaler-v1",
    ami: Annotated[
        str | None, text_option("Image of all machines.", "ID", panel=MACHINES, default="Ray's for the region")
    ] = None,
    token_file: Annotated[str, text_option("Ray's token, on your machine.", "PATH")] = "~/.ray/auth_token",
) -> None:
    """A cluster on AWS that Ray starts, and stops after the merge."""
    from raymerge.cluster.manifests.ray_up import RayUp, make_ray_up

    target = RayUp(
        image=find_image(software, job),
        region=region,
        instance_type=instance_type or ("g5.2xlarge" if job.gpus else "m5.2xlarge"),
        ami=ami,
        instance_profile=instance_profile,
        token_file=token_file,
        num_gpus=job.gpus,
    )
    apply = "ray exec FILE --start --stop 'bash merge.sh'"
    made = _make_job(config, out, job, options, software, apply=apply, is_spread=True)
    _print(partial(make_ray_up, made, target))


def _make_job(
    config: Path,
    out: str,
    job: JobOptions,
    options: MergeOptions,
    software: SoftwareOptions | None = None,
    *,
    apply: str,
    is_spread: bool,
) -> Job:
    """Return the job that the options describe.

    Args:
        config: of the merge.
        out: path or URL of the output.
        job: what all kinds of jobs take.
        options: of the merge.
        software: of containers; None where the machines have raymerge.
        apply: the command that runs the job, with FILE in it.
        is_spread: whether several machines take part.

    Raises:
        ConfigError: the config is wrong, or names what is not the same on all machines, or there is a credential.
    """
    from raymerge.cluster.manifests.job import Job
    from raymerge.pipeline.cli.portable import load_portable

    if repository_of(out) is not None and is_spread:
        raise ConfigError(
            f"{out}: shards for the Hub are gathered on one machine, and the job has several; merge to a bucket"
        )
    environment = parse_pairs("--env", job.env)
    given = [("--setup", job.setup), ("--wheel", software and software.wheel)]
    for what, text in (*given, *((f"--env {name}", f"{name}={value}") for name, value in environment)):
        if text and redact(text) != text:
            raise ConfigError(
                f"{what} has a credential in it, which everybody who may see the manifest could read; name a role, a"
                " service account or a secret instead"
            )
    if options.gpu_memory and not job.gpus:
        raise ConfigError("--gpu-memory is for GPUs, and the job has none; say how many each machine has with --gpus")
    if job.gpus and not options.gpu_memory:
        say("warning: --gpus without --gpu-memory: the job is given GPUs, and merges without them")
    wheel = find_wheel(software, job) if software else None
    loaded = load_portable(config, out, options, with_plan=job.plan)
    # The run that this one goes on from may be dead, and its lock not yet free.
    arguments = list_arguments(replace(options, wait=True))
    return Job(
        name=job.name,
        config=loaded.text,
        arguments=(out, *arguments),
        wheel=wheel,
        setup=job.setup or "",
        environment=environment,
        num_nodes=job.nodes,
        comment=f"{shlex.join(['raymerge', *sys.argv[1:]])}\n{apply}",
    )


def _print(make: Callable[[], str]) -> None:
    """Print a manifest.

    Raises:
        ConfigError: the scheduler would refuse it; the message names the option.
    """
    from raymerge.cluster.errors import ManifestError

    try:
        typer.echo(make(), nl=False)
    except ManifestError as error:
        option = f"--{error.field.replace('_', '-')} " if error.field else ""
        raise ConfigError(f"{option}{error}") from None
