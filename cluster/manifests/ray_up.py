"""A config for `ray up`: machines of AWS that Ray starts and stops itself."""

from __future__ import annotations

import base64
import re
import shlex
from dataclasses import dataclass

from raymerge.cluster.errors import ManifestError
from raymerge.cluster.manifests.job import CONFIG_FILE, Job, check_nbytes, check_values, dump_documents
from raymerge.cluster.ray.session import STORE_NBYTES

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,62}")
_MAX_NBYTES = 64 * 2**10
"""The config is sent to the head in a command line, which Linux limits to 128 KiB."""
_JOIN_SECONDS = 1800
_HEAD_TYPE = "m5.large"
"""Machine type of the head, which plans and coordinates but does not merge."""
_HOME = "/home/ray"
_TOKEN_FILE = f"{_HOME}/.ray/auth_token"
_START = f"ulimit -n 65536; ray start --object-store-memory={STORE_NBYTES}"


@dataclass(frozen=True, slots=True)
class RayUp:
    """Settings of `ray up` on AWS."""

    image: str
    region: str
    instance_type: str
    ami: str | None
    """None for Ray's default in the region."""
    instance_profile: str
    """Name of the instance profile of the machines that merge, which permits reading and writing."""
    token_file: str
    """On the machine where `ray up` is called; copied to the others."""
    num_gpus: int
    """GPUs of each machine that merges."""


def make_ray_up(job: Job, target: RayUp) -> str:
    """Return the YAML that `ray up` and `ray exec` take.

    Raises:
        ManifestError: a name that AWS would refuse, or too large a config.
    """
    check_values(target, job.wheel)
    if not _NAME.fullmatch(job.name):
        raise ManifestError(
            f"{job.name!r} is no name for a cluster; use letters, digits, `-` and `_`, 63 at most", "name"
        )
    script = (
        "cd\n"
        f"python3 -m raymerge.cluster.roll_call {job.num_nodes} {_JOIN_SECONDS} && exec {job.command(CONFIG_FILE)}\n"
    )
    writing = [_write_file(CONFIG_FILE, job.config), _write_file("merge.sh", script)]
    check_nbytes("a command line", max(map(len, writing)), _MAX_NBYTES)
    variables = job.variables() | {"RAY_AUTH_MODE": "token"}
    machine = {"ImageId": target.ami} if target.ami else {}
    wheel = {f"{_HOME}/{job.wheel.name}": job.wheel.source} if job.wheel and job.wheel.content is not None else {}
    cluster = {
        "cluster_name": job.name,
        "max_workers": job.num_nodes,
        "provider": {"type": "aws", "region": target.region, "cache_stopped_nodes": False},
        "auth": {"ssh_user": "ubuntu"},
        "docker": {
            "image": target.image,
            "container_name": "raymerge",
            "run_options": [
                "--ulimit nofile=65536:65536",
                *(f"--env {shlex.quote(f'{name}={value}')}" for name, value in variables.items()),
            ],
        },
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 0}, "node_config": {"InstanceType": _HEAD_TYPE, **machine}},
            "worker": {
                "min_workers": job.num_nodes,
                "max_workers": job.num_nodes,
                "resources": {"GPU": target.num_gpus} if target.num_gpus else {},
                "node_config": {
                    "InstanceType": target.instance_type,
                    "IamInstanceProfile": {"Name": target.instance_profile},
                    **machine,
                },
            },
        },
        "file_mounts": {_TOKEN_FILE: target.token_file, **wheel},
        "setup_commands": [preparation] if (preparation := job.preparation(_HOME)) else [],
        "head_setup_commands": writing,
        "head_start_ray_commands": [
            "ray stop",
            f"{_START} --head --port=6379 --num-cpus=0 --autoscaling-config=~/ray_bootstrap_config.yaml",
        ],
        "worker_start_ray_commands": ["ray stop", f"{_START} --address=$RAY_HEAD_IP:6379"],
    }
    return dump_documents(job.comment, cluster)


def _write_file(name: str, text: str) -> str:
    """Return a command that writes a file in the home directory, whatever shells it goes through."""
    return f"echo {base64.b64encode(text.encode()).decode()} | base64 --decode > ~/{name}"
