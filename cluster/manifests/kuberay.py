"""A RayJob for the KubeRay operator, and a ConfigMap with what it runs."""

from __future__ import annotations

import re
from base64 import b64encode
from dataclasses import dataclass

from raymerge.cluster.errors import ManifestError
from raymerge.cluster.manifests.job import CONFIG_FILE, Job, NodeSize, check_nbytes, check_values, dump_documents

_NAME = re.compile(r"[a-z]([a-z0-9-]{0,45}[a-z0-9])?")
_MAX_NBYTES = 1_000_000
"""Kubernetes takes 1 MiB in a ConfigMap if nothing keeps a copy in an annotation: `kubectl apply --server-side`."""
_MOUNT = "/etc/raymerge"
_HEAD_RESOURCES = {"cpu": "2", "memory": "8Gi"}
"""Resources of the head, which plans and coordinates but does not merge."""
_KEPT_SECONDS = 600
"""Time for which pods and their logs are kept after the end."""


@dataclass(frozen=True, slots=True)
class KubeRay:
    """Settings of KubeRay."""

    image: str
    ray_version: str
    """Version of Ray in the image."""
    namespace: str | None
    service_account: str | None
    """Account of the pods; if it is bound to a role, that permits reading and writing."""
    env_secret: tuple[str, ...]
    """Secrets that become environment variables of the pods."""
    num_attempts: int
    num_seconds: int
    """Time limit of the job."""


def make_kuberay(job: Job, size: NodeSize, target: KubeRay) -> str:
    """Return the YAML that `kubectl apply` takes.

    Nothing of the user's goes into a command line: KubeRay builds its own from what it finds, without quoting.

    Raises:
        ManifestError: a name that Kubernetes would refuse, or too large a config.
    """
    check_values(target, job.wheel)
    _check_name("name", job.name, 47)
    for field, name in (("namespace", target.namespace), ("service_account", target.service_account)):
        if name is not None:
            _check_name(field, name, 63)
    if not all(_NAME.fullmatch(name) for name in target.env_secret):
        raise ManifestError("takes names of secrets: small letters, digits and `-`", "env_secret")
    metadata = {"name": job.name} | ({"namespace": target.namespace} if target.namespace else {})
    config_map: dict[str, object] = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": metadata,
        "data": {
            CONFIG_FILE: job.config,
            "setup.sh": f"{job.preparation(_MOUNT)}\n",
            "merge.sh": f"exec {job.command(f'{_MOUNT}/{CONFIG_FILE}')}\n",
        },
    }
    if job.wheel and job.wheel.content is not None:
        config_map["binaryData"] = {job.wheel.name: b64encode(job.wheel.content).decode()}
    check_nbytes("the ConfigMap", len(dump_documents("", config_map).encode()), _MAX_NBYTES)
    ray_job = {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": metadata,
        "spec": {
            "entrypoint": f"bash {_MOUNT}/merge.sh",
            "backoffLimit": target.num_attempts - 1,
            "activeDeadlineSeconds": target.num_seconds,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": _KEPT_SECONDS,
            "rayClusterSpec": {
                "rayVersion": target.ray_version,
                "authOptions": {"mode": "token"},
                "headGroupSpec": {
                    "rayStartParams": {
                        "num-cpus": "0",
                        "object-store-memory": size.ray_options()["object-store-memory"],
                    },
                    "template": _make_pod(job, target, "ray-head", _HEAD_RESOURCES),
                },
                "workerGroupSpecs": [
                    {
                        "groupName": "workers",
                        "replicas": job.num_nodes,
                        "minReplicas": job.num_nodes,
                        "maxReplicas": job.num_nodes,
                        "rayStartParams": size.ray_options(),
                        "template": _make_pod(job, target, "ray-worker", _resources(size)),
                    }
                ],
            },
        },
    }
    return dump_documents(job.comment, config_map, ray_job)


def _resources(size: NodeSize) -> dict[str, str]:
    gpus = {"nvidia.com/gpu": str(size.num_gpus)} if size.num_gpus else {}
    return {"cpu": str(size.num_cpus), "memory": f"{size.mem_nbytes // 2**20}Mi", **gpus}


def _make_pod(job: Job, target: KubeRay, name: str, resources: dict[str, str]) -> dict[str, object]:
    # Kubernetes reads $(NAME) in values, and $$ as a dollar sign.
    variables = [{"name": name, "value": value.replace("$", "$$")} for name, value in job.variables().items()]
    secrets = [{"secretRef": {"name": name}} for name in target.env_secret]
    container: dict[str, object] = {
        "name": name,
        "image": target.image,
        "args": [f". {_MOUNT}/setup.sh || exit 1"],  # KubeRay appends the start of Ray
        "env": variables,
        **({"envFrom": secrets} if secrets else {}),
        "resources": {"requests": dict(resources), "limits": dict(resources)},
        "volumeMounts": [{"name": "raymerge", "mountPath": _MOUNT, "readOnly": True}],
    }
    account = {"serviceAccountName": target.service_account} if target.service_account else {}
    volume = {"name": "raymerge", "configMap": {"name": job.name}}
    return {"spec": {**account, "containers": [container], "volumes": [volume]}}


def _check_name(field: str, name: str, max_length: int) -> None:
    if not _NAME.fullmatch(name) or len(name) > max_length:
        raise ManifestError(
            f"{name!r} is no name for Kubernetes; use small letters, digits and `-`, {max_length} at most", field
        )
