"""The commands `submit` and `jobs`: merges on a cluster that this machine is not part of."""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from datetime import datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer

from raymerge import __version__
from raymerge.pipeline.cli.console import put, say, say_hint
from raymerge.pipeline.cli.options import (
    MESSAGES,
    Address,
    ConfigFile,
    Out,
    Plan,
    RemoteOptions,
    list_arguments,
    takes_options,
)
from raymerge.pipeline.options import CLUSTER, Help
from raymerge.pipeline.redact import redact

if TYPE_CHECKING:
    from raymerge.cluster.job_client import Job, JobClient

_CONFIG = "merge.yml"
"""The config's name on the cluster."""

_OPS = "own_ops.py"
"""The name there of a file of ops."""

_NO_PYTHON = 127
"""The shell's exit code for a command that does not exist."""

_STOP_SECONDS = 20
"""Time that a stopped job has to release its lock and end its uploads; Ray's default is 3."""


JobId = Annotated[str, typer.Argument(metavar="ID", show_default=False)]


@takes_options
def submit(
    config: ConfigFile,
    out: Out,
    address: Address,
    options: RemoteOptions,
    pip: Annotated[bool, Help("Install what raymerge needs on the cluster before it begins.", CLUSTER)] = False,
    plan: Plan = True,
    follow: Annotated[bool, Help("Show how it goes until it ends, and exit with its code.", MESSAGES)] = False,
) -> None:
    """Merge the models of CONFIG into OUT as a job of a Ray cluster, after planning it here.

    The cluster's machines need Ray, and torch and what else raymerge needs unless --pip installs it; raymerge itself
    and CONFIG are sent. Nothing secret is: the machines find their own credentials.
    """
    import secrets

    from raymerge.cluster.errors import ClusterConnectError
    from raymerge.cluster.job_client import JobClient, RefusedError
    from raymerge.cluster.package import list_requirements, pack_files, pack_raymerge
    from raymerge.pipeline.cli.portable import load_portable
    from raymerge.pipeline.runners import list_cluster_variables

    client = JobClient(address)
    loaded = load_portable(config, out, options, with_plan=plan)
    job_id = f"raymerge-{secrets.token_hex(4)}"
    environment: dict[str, Any] = {
        "env_vars": {**list_cluster_variables(), "RAY_JOB_STOP_WAIT_TIME_S": str(_STOP_SECONDS)}
    }
    if pip:
        environment["pip"] = list_requirements()
    command = [
        "python",
        "-m",
        "raymerge",
        "merge",
        _CONFIG,
        out,
        "--log-json",
        *list_arguments(replace(options, ops=_OPS if loaded.own else None)),
    ]
    files = {_CONFIG: loaded.text.encode()}
    if loaded.own is not None:
        files[_OPS] = loaded.own.source.encode()
    packages = {"working_dir": pack_files(files), "py_modules": pack_raymerge()}
    about = {"raymerge": __version__, "config": config.name, "out": out}
    try:
        client.submit(job_id, shlex.join(command), packages, environment, about)
    except ClusterConnectError as error:
        hint = f"; it may have begun all the same: {_format_command('status', client, job_id)}"
        raise type(error)(f"{error}{'' if isinstance(error, RefusedError) else hint}") from None
    put(job_id)
    if follow:
        sys.exit(_follow(client, job_id))
    say_hint(f"Submitted. To see how it goes: {_format_command('logs', client, job_id)} --follow")


jobs = typer.Typer(no_args_is_help=True, help="Look after the jobs that `submit` has started.")


@jobs.command("list", epilog="Example: raymerge jobs list --address http://head:8265")
def list_jobs(address: Address) -> None:
    """List the merges that the cluster remembers, the latest first."""
    from raymerge.cluster.job_client import JobClient

    for job in JobClient(address).list_jobs():
        if "raymerge" in job.metadata:
            put(f"{job.id}  {job.status:<9}  {_format_time(job.started)}  {job.metadata.get('out', '')}")


@jobs.command(epilog="Example: raymerge jobs status raymerge-1a2b3c4d --address http://head:8265")
def status(job_id: JobId, address: Address) -> None:
    """Show the status of a job."""
    from raymerge.cluster.job_client import JobClient

    job = JobClient(address).find_job(job_id)
    put(f"{job.id}: {job.status}")
    for name in ("config", "out"):
        if name in job.metadata:
            put(f"{name}: {job.metadata[name]}")
    put(f"started: {_format_time(job.started)}")
    if job.ended:
        put(f"ended: {_format_time(job.ended)}")
    if job.exit_code is not None:
        put(f"exit code: {job.exit_code}")
    if job.status == "FAILED":
        put(redact(_explain(job)))


@jobs.command(epilog="Example: raymerge jobs logs raymerge-1a2b3c4d --address http://head:8265 --follow")
@takes_options
def logs(
    job_id: JobId,
    address: Address,
    follow: Annotated[bool, Help("Go on until the job ends, and exit with its code.", MESSAGES)] = False,
) -> None:
    """Show the log of a job."""
    from raymerge.cluster.job_client import JobClient
    from raymerge.pipeline.cli.display.merge import Display

    client = JobClient(address)
    if follow:
        sys.exit(_follow(client, job_id))
    with Display(verbose=True, quiet=False) as display:
        for line in client.read_log(job_id).splitlines():
            display.show_line(line)


@jobs.command(epilog="Example: raymerge jobs stop raymerge-1a2b3c4d --address http://head:8265")
def stop(job_id: JobId, address: Address) -> None:
    """Stop a job. Finished shards are kept; the same `submit` resumes."""
    from raymerge.cluster.job_client import JobClient

    client = JobClient(address)
    if client.stop(job_id):
        client.follow(job_id, lambda line: None)
    put(f"{job_id}: {client.find_job(job_id).status}")


def _follow(client: JobClient, job_id: str) -> int:
    """Show a job until it ends as if it ran here, and return its exit code."""
    from raymerge.pipeline.cli.display.merge import Display

    try:
        with Display(verbose=False, quiet=False) as display:
            job = client.follow(job_id, display.show_line, display.show_line)
    except KeyboardInterrupt:
        say_hint(
            f"The job goes on. To see how it goes: {_format_command('logs', client, job_id)} --follow; to stop it:"
            f" {_format_command('stop', client, job_id)}"
        )
        return 130
    if job.status == "FAILED":
        say(redact(_explain(job)))
    if job.status == "STOPPED":
        say_hint(f"{job_id} was stopped. What is finished is kept: submit the same merge again to go on.")
        return 130
    if job.exit_code is None or job.exit_code == _NO_PYTHON or (job.status == "FAILED" and job.exit_code == 0):
        return 2
    return job.exit_code if job.exit_code >= 0 else 128 - job.exit_code  # by a signal, as shells count


def _format_command(what: str, client: JobClient, job_id: str) -> str:
    """Return a command about a job, to be copied."""
    return f"raymerge jobs {what} {job_id} --address {client.address}"


def _explain(job: Job) -> str:
    """Return why a job has failed where its log does not say so."""
    if job.exit_code == _NO_PYTHON:
        return (
            f"{job.id} failed: the head of the cluster has no `python` on its PATH; activate the environment that has"
            " Ray and torch before `ray start` there"
        )
    if job.exit_code is None:
        return f"{job.id} failed before it began: {job.message}"
    return f"{job.id} failed with exit code {job.exit_code}" + (f": {job.message}" if job.exit_code == 0 else "")


def _format_time(time: datetime | None) -> str:
    return "not yet" if time is None else time.astimezone().isoformat(sep=" ", timespec="seconds")
