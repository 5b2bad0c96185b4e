"""A connection to Ray: started for the occasion on this machine, or to a cluster that runs already."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import urlsplit

import raymerge
from raymerge.cluster.errors import ClusterConnectError, ResourceError

_SETTINGS = {
    "RAY_task_oom_retries": "0",  # we repeat an item ourselves, with more memory; Ray would do so for ever
    "RAY_grpc_client_keepalive_time_ms": "15000",  # a node that is cut off is noticed after seven minutes otherwise
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as without Ray; at 15 a busy machine would hardly run them
}
"""Read by Ray when it is imported: a caller that has imported it before has to set them itself."""

_CONNECT_SECONDS = 5.0

_STORE_NBYTES = 128 * 2**20
"""For progress and results, which are small; Ray would take a third of the memory."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster that can run work."""

    host: str
    """Its address."""
    num_cpus: int
    mem_nbytes: int
    """What Ray may give to work, in bytes."""
    num_gpus: int = 0


@dataclass(frozen=True, slots=True)
class RaySession:
    """A cluster that we are connected to."""

    host: str
    """The address of this machine."""
    nodes: tuple[Node, ...]
    """Those that have processors to offer, at least one."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether work may run on another machine than this one."""
        return any(node.host != self.host for node in self.nodes)

    def with_gpus(self) -> RaySession:
        """Return what there is of it for work that needs GPUs.

        Raises:
            ResourceError: no node has any.
        """
        if nodes := tuple(node for node in self.nodes if node.num_gpus):
            return replace(self, nodes=nodes)
        raise ResourceError(
            "the plan needs GPUs, and no node of the cluster has one; leave --gpu-memory out, or add a node with GPUs"
            " (`ray start` says how many it found)"
        )


@contextmanager
def start_ray(num_cpus: int, num_gpus: int | None = None) -> Iterator[RaySession]:
    """Start Ray on this machine, for so many items at once, and stop it at the end.

    Args:
        num_cpus: items at once.
        num_gpus: to be shared by them; those that there are by default.

    Raises:
        ClusterConnectError: Ray is not installed, or does not start.
    """
    directory = tempfile.mkdtemp(prefix="raymerge-", dir="/tmp")  # short: sockets with names of 107 bytes are in it
    try:
        with _connected(
            "local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=_STORE_NBYTES,
            _temp_dir=f"{directory}/ray",  # Ray lets everybody write there, and nobody else gets past its parent
        ) as session:
            yield session
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextmanager
def connect_ray(address: str, environment: Sequence[str] = ()) -> Iterator[RaySession]:
    """Be a driver of a running cluster.

    Args:
        address: of its head, as in `10.0.0.5:6379`.
        environment: names of environment variables that workers get as they are here; every user of the cluster can see
            them.

    Raises:
        ClusterConnectError: Ray is not installed, nobody answers there, or the cluster refuses us.
    """
    variables = {name: os.environ[name] for name in environment if name in os.environ}
    for name, value in variables.items():
        if urlsplit(value).password:
            raise ClusterConnectError(
                f"{name} has a password in it, which all users of the cluster would see; give workers their credentials"
                " on their own machines"
            )
    _check_address(address)
    with _connected(address, runtime_env={"py_modules": [raymerge], "env_vars": variables}) as session:
        yield session


def list_nodes() -> tuple[Node, ...]:
    """Return the nodes that are alive now and have processors to offer."""
    import ray

    return tuple(
        Node(
            node["NodeManagerAddress"],
            int(node["Resources"]["CPU"]),
            int(node["Resources"].get("memory", 0)),
            int(node["Resources"].get("GPU", 0)),
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    )


@contextmanager
def _connected(address: str, **options: Any) -> Iterator[RaySession]:
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ImportError:
        raise ClusterConnectError("Ray is not installed here: pip install 'raymerge[ray]'") from None
    logging.getLogger("ray").setLevel(logging.ERROR)
    try:
        try:
            ray.init(address, log_to_driver=False, configure_logging=False, **options)
        except (ray.exceptions.RayError, ConnectionError, RuntimeError, ValueError, OSError) as error:
            raise ClusterConnectError(_explain(address, error)) from error
        nodes = list_nodes()
        if not nodes:
            raise ClusterConnectError(
                f"the Ray cluster at {address} has no node with processors; add one with"
                f" `ray start --address {address}`"
            )
        yield RaySession(ray.util.get_node_ip_address(), nodes)
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Find out soon whether there is anybody: Ray itself tries for half a minute."""
    host, _, port = address.rpartition(":")
    if "://" in address or not host or not port.isdigit():
        raise ClusterConnectError(
            f"{address} is not the address of a cluster; give host and port of its head, as in 10.0.0.5:6379"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ClusterConnectError(
            f"nobody answers at {address} ({error}); check the address with `ray status` on the cluster's head,"
            " and that this machine may reach it"
        ) from None


def _explain(address: str, error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    if address == "local":
        return f"Ray does not start on this machine: {lines[0]}; leave --ray out to merge without it"
    if "ersion mismatch" in str(error):
        return f"the Ray cluster at {address} does not fit to what is installed here: {' '.join(lines)}"
    return (
        f"cannot connect to Ray at {address}: {lines[0]}; if the cluster asks for a token, set RAY_AUTH_MODE=token and"
        " RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on its head"
    )
