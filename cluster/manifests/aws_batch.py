"""A job definition for AWS Batch, of several nodes."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from raymerge.cluster.errors import ManifestError
from raymerge.cluster.manifests.job import (
    Job,
    NodeSize,
    check_nbytes,
    check_values,
    dump_documents,
    read_start_script,
    start_variables,
)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_ROLE = re.compile(r"arn:aws[a-z-]*:iam::\d{12}:role/\S+")
_MAX_NBYTES = 24 * 2**10
_SHARED_MIB = 512
"""/dev/shm, where Ray's object store is."""
_FACTS = """\
export RAYMERGE_IS_HEAD=$((AWS_BATCH_JOB_NODE_INDEX == AWS_BATCH_JOB_MAIN_NODE_INDEX))
export RAYMERGE_HEAD=${AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS:-$(hostname)}
export RAYMERGE_NODES=$AWS_BATCH_JOB_NUM_NODES
"""
"""From the scheduler's variables; the main node is not told its own address."""


@dataclass(frozen=True, slots=True)
class AwsBatch:
    """Settings of AWS Batch."""

    image: str
    job_role: str | None
    """ARN of the containers' role, which permits reading and writing; None for the machines' role."""
    execution_role: str
    """ARN of the role that starts the containers and may read the secrets."""
    token_secret: str
    """Place of Ray's token: an ARN of the Secrets Manager, or the name of a parameter of the Parameter Store."""
    env_secret: tuple[tuple[str, str], ...]
    """Environment variables, and where their values are kept, in the same form."""
    num_attempts: int
    num_seconds: int
    """Time limit of each attempt."""


def make_aws_batch(job: Job, size: NodeSize, target: AwsBatch) -> str:
    """Return the YAML that `aws batch register-job-definition --cli-input-yaml` takes.

    Raises:
        ManifestError: a name that Batch would refuse, or too large a config.
    """
    check_values(target, job.wheel)
    if not _NAME.fullmatch(job.name):
        raise ManifestError(
            f"{job.name!r} is no name for AWS Batch; use letters, digits, `-` and `_`, 128 at most", "name"
        )
    if job.wheel and job.wheel.content is not None:
        raise ManifestError(
            f"{job.wheel.source}: AWS Batch sends no files along; put it where the machines can fetch it and give"
            " that URL, or name an image that has raymerge",
            "wheel",
        )
    for field, role in (("job_role", target.job_role), ("execution_role", target.execution_role)):
        if role is not None and not _ROLE.fullmatch(role):
            raise ManifestError(
                f"{role!r} is not the ARN of a role: arn:aws:iam::, the account's number, :role/NAME", field
            )
    secrets = (("RAY_AUTH_TOKEN", target.token_secret), *target.env_secret)
    _check_place("token_secret", target.token_secret)
    for name, place in target.env_secret:
        _check_place("env_secret", place, f"{name} ")
    variables = {**start_variables(job, size), "RAYMERGE_CONFIG": job.config}
    gpus = [{"type": "GPU", "value": str(size.num_gpus)}] if size.num_gpus else []
    container = {
        "image": target.image,
        "command": ["bash", "-c", _FACTS + read_start_script()],
        "executionRoleArn": target.execution_role,
        **({"jobRoleArn": target.job_role} if target.job_role else {}),
        "resourceRequirements": [
            {"type": "VCPU", "value": str(size.num_cpus)},
            {"type": "MEMORY", "value": str(size.mem_nbytes // 2**20)},
            *gpus,
        ],
        "environment": [{"name": name, "value": value} for name, value in variables.items() if value],
        "secrets": [{"name": name, "valueFrom": place} for name, place in secrets],
        "linuxParameters": {"initProcessEnabled": True, "sharedMemorySize": _SHARED_MIB},
        "ulimits": [{"name": "nofile", "softLimit": 65536, "hardLimit": 65536}],
    }
    definition = {
        "jobDefinitionName": job.name,
        "type": "multinode",
        "retryStrategy": {"attempts": target.num_attempts},
        "timeout": {"attemptDurationSeconds": target.num_seconds},
        "nodeProperties": {
            "numNodes": job.num_nodes,
            "mainNode": 0,
            "nodeRangeProperties": [{"targetNodes": "0:", "container": container}],
        },
    }
    check_nbytes("the job definition", len(json.dumps(definition)), _MAX_NBYTES)
    return dump_documents(job.comment, definition)


def _check_place(field: str, place: str, name: str = "") -> None:
    """Refuse what may be the secret itself, without repeating it."""
    if not place.startswith(("arn:", "/")):
        raise ManifestError(
            f"{name}is neither an ARN nor the path of a parameter, such as /raymerge/token; say where the secret is"
            " kept, not what it is",
            field,
        )
