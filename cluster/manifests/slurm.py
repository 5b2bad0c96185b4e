"""A batch script for Slurm."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from raymerge.cluster.manifests.job import (
    Job,
    NodeSize,
    check_nbytes,
    comment_lines,
    read_start_script,
    start_variables,
)

_MAX_NBYTES = 100_000
"""Linux takes 128 KiB in one environment variable."""


@dataclass(frozen=True, slots=True)
class Slurm:
    """Settings of Slurm."""

    partition: str | None
    account: str | None
    num_seconds: int
    """Time limit of the job."""


def make_slurm(job: Job, size: NodeSize, target: Slurm) -> str:
    """Return the script that `sbatch` takes.

    The token of the Ray cluster is made when the job runs, and goes from node to node as Slurm's own messages do.

    Raises:
        ManifestError: too large a config.
    """
    check_nbytes("an environment variable", len(job.config.encode()), _MAX_NBYTES)
    options = {
        "job-name": job.name,
        "partition": target.partition,
        "account": target.account,
        "nodes": str(job.num_nodes),
        "ntasks-per-node": "1",
        "exclusive": "",
        "cpus-per-task": str(size.num_cpus),
        "mem": f"{size.mem_nbytes // 2**20}M",
        "gpus-per-node": str(size.num_gpus) if size.num_gpus else None,
        "time": _format_time(target.num_seconds),
        "requeue": "",
        "open-mode": "append",
    }
    directives = "".join(
        f"#SBATCH --{name}{f'={shlex.quote(value)}' if value else ''}\n"
        for name, value in options.items()
        if value is not None
    )
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in start_variables(job, size).items())
    return f"""\
#!/usr/bin/env bash
{directives}
{comment_lines(job.comment)}
set -euo pipefail

{_read_into("RAYMERGE_CONFIG", job.config)}
{_read_into("RAYMERGE_START", read_start_script())}
{exports}
RAYMERGE_HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
RAYMERGE_HEAD=${{RAYMERGE_HEAD%%$'\\n'*}} # the first line
RAYMERGE_NODES=$SLURM_JOB_NUM_NODES
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \\n')
export RAYMERGE_CONFIG RAYMERGE_START RAYMERGE_HEAD RAYMERGE_NODES RAY_AUTH_TOKEN

# The job ends as its head does.
srun --export=ALL --cpus-per-task={size.num_cpus} --kill-on-bad-exit=0 bash -c '
  export RAYMERGE_IS_HEAD=$((SLURM_NODEID == 0))
  bash -c "$RAYMERGE_START" || exit $((RAYMERGE_IS_HEAD ? $? : 0))'
"""


def _read_into(name: str, text: str) -> str:
    """Return shell code that puts a text into a variable; `sbatch` takes no carriage returns."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    end = f"END_OF_{name}"
    while end in lines:
        end += "_"
    return f"IFS= read -r -d '' {name} <<'{end}' || true\n" + "".join(f"{line}\n" for line in lines) + f"{end}\n"


def _format_time(num_seconds: int) -> str:
    """Return a time as Slurm writes it.

    >>> _format_time(86_461)
    '24:01:01'
    """
    return f"{num_seconds // 3600:02}:{num_seconds // 60 % 60:02}:{num_seconds % 60:02}"
