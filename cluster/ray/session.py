"""A connection to Ray: started for the occasion on this machine, or to a cluster that runs already."""

from __future__ import annotations

import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import raymerge
from raymerge.cluster.directory import make_directory
from raymerge.cluster.errors import ClusterConnectError, HeadLostError, ResourceError
from raymerge.cluster.home import find_home, is_writable

SETTINGS = {
    "RAY_task_oom_retries": "0",  # we repeat an item ourselves, with more memory; Ray would do so for ever
    "RAY_grpc_client_keepalive_time_ms": "15000",  # a node that is cut off is noticed after seven minutes otherwise
    "RAY_grpc_client_keepalive_timeout_ms": "10000",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",  # under `uv run` Ray would upload the working directory
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # as without Ray; at 15 a busy machine would hardly run them
}
"""Read by Ray when it is imported or started: a caller that has imported it before has to set them itself."""

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for the drivers of jobs."""

_CONNECT_SECONDS = 5.0

_MAX_SHOWN = 500
"""Characters of Ray's own explanations in a message."""

_HEAD_LOOK_SECONDS = 5.0
"""Between looks at whether the head is there."""

_HEAD_ANSWER_SECONDS = 2.0

_HEAD_LOST_SECONDS = 20.0
"""Longest silence of the head; after 60 s Ray ends the process."""

RESERVED_MEM = 400 * 2**20
"""Bytes that a worker has before its first item: interpreter, torch, Ray."""

TASK_NBYTES = 8 * 2**20
"""Bytes that Ray takes of a worker while it runs an item: threads, reports under way. Measured: 2 to 6 MiB."""

STORE_NBYTES = 128 * 2**20
"""For progress and results, which are small; Ray would take a third of the memory."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine of the cluster that can run work."""

    host: str
    """Its address."""
    num_cpus: int
    mem_nbytes: int
    """Memory that Ray may give to work, in bytes."""
    num_gpus: int = 0
    node_id: str = ""
    """Ray's name for it."""


@dataclass(frozen=True, slots=True)
class RaySession:
    """A cluster that we are connected to."""

    host: str
    """The address of this machine."""
    nodes: tuple[Node, ...]
    """Nodes that have processors to offer, at least one."""

    @property
    def is_elsewhere(self) -> bool:
        """Whether work may run on another machine than this one."""
        return any(node.host != self.host for node in self.nodes)

    def with_gpus(self) -> RaySession:
        """Return the session restricted to nodes with GPUs.

        Raises:
            ResourceError: no node has any.
        """
        if nodes := tuple(node for node in self.nodes if node.num_gpus):
            return replace(self, nodes=nodes)
        raise ResourceError(
            "the work needs GPUs, and no node of the cluster has one; do without, or add a node with GPUs"
            " (`ray start` says how many it found)"
        )


@contextmanager
def start_ray(num_cpus: int, num_gpus: int | None = None) -> Iterator[RaySession]:
    """Start Ray on this machine, for so many items at once, and stop it at the end.

    Args:
        num_cpus: items at once.
        num_gpus: to be shared by them; those that there are by default.

    Raises:
        ClusterConnectError: Ray does not start.
    """
    with (
        _own_directory() as directory,
        _own_token(),
        _connected(
            "local",
            num_cpus=num_cpus,
            num_gpus=num_gpus,
            include_dashboard=False,
            object_store_memory=STORE_NBYTES,
            _temp_dir=f"{directory}/ray",  # Ray lets everybody write there, and nobody else gets past its parent
        ) as session,
    ):
        yield session


@contextmanager
def connect_ray(address: str, variables: Mapping[str, str]) -> Iterator[RaySession]:
    """Be a driver of a running cluster.

    Args:
        address: of its head, as in `10.0.0.5:6379`, or `auto`: the cluster that this machine is part of.
        variables: of the environment, which workers get; every user of the cluster can see them.

    Raises:
        ClusterConnectError: nobody answers there, or the cluster refuses us.
    """
    if address != "auto":
        _check_address(address)
    elif given := os.environ.get("RAY_ADDRESS"):
        _check_variable(given)
    # a job's workers have what was submitted with it, and Ray refuses to be told twice
    runtime_env = {} if _JOB_VARIABLE in os.environ else {"py_modules": [raymerge], "env_vars": dict(variables)}
    with _connected(address, runtime_env=runtime_env) as session:
        yield session


class HeadWatch:
    """Notices that the cluster's head is gone, before Ray ends this process because of that, without a word to us."""

    def __init__(self) -> None:
        import ray

        host, _, port = ray.get_runtime_context().gcs_address.rpartition(":")
        self._address = (host.strip("[]"), int(port))
        self._answered_at = self._looked_at = time.monotonic()

    def check_sometimes(self) -> None:
        """Call `check` if the last look was some seconds ago."""
        if time.monotonic() - self._looked_at > _HEAD_LOOK_SECONDS:
            self.check()

    def check(self) -> bool:
        """Return whether the head answers now; a request to Ray would wait for it for ever.

        Raises:
            HeadLostError: it has not answered for a while.
        """
        self._looked_at = time.monotonic()
        try:
            socket.create_connection(self._address, _HEAD_ANSWER_SECONDS).close()
        except OSError as error:
            seconds = self._looked_at - self._answered_at
            if seconds > _HEAD_LOST_SECONDS:
                raise HeadLostError(
                    f"the head of the Ray cluster has not answered at {':'.join(map(str, self._address))} for"
                    f" {seconds:.0f} s ({error}); what is finished is kept: run the same command again when it is back"
                ) from None
            return False
        self._answered_at = self._looked_at
        return True


def list_nodes() -> tuple[Node, ...]:
    """Return the nodes that are alive now and have processors to offer."""
    import ray

    return tuple(
        Node(
            node["NodeManagerAddress"],
            int(node["Resources"]["CPU"]),
            int(node["Resources"].get("memory", 0)),
            int(node["Resources"].get("GPU", 0)),
            node["NodeID"],
        )
        for node in ray.nodes()
        if node["Alive"] and node["Resources"].get("CPU", 0) >= 1
    )


@contextmanager
def _connected(address: str, **options: Any) -> Iterator[RaySession]:
    settings = SETTINGS if address == "local" else {**SETTINGS, "RAY_NUM_REDIS_GET_RETRIES": "5"}
    for name, value in settings.items():  # retries, a second each: also where a token is refused
        os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        raise ClusterConnectError("this process is connected to Ray already; call ray.shutdown() first")
    logging.getLogger("ray").setLevel(logging.ERROR)
    on_term = signal.getsignal(signal.SIGTERM)
    try:
        try:
            ray.init(address, log_to_driver=False, configure_logging=False, **options)
        except Exception as error:  # of any kind: a node that does not start in time is a bare Exception of Ray's
            raise ClusterConnectError(_explain(address, error)) from error
        finally:
            if on_term is not None and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, on_term)  # Ray would have us exit there and then
        nodes = list_nodes()
        if not nodes:
            raise ClusterConnectError(
                f"the Ray cluster at {address} has no node with processors; add one with"
                f" `ray start --address {ray.get_runtime_context().gcs_address}`"
            )
        yield RaySession(ray.util.get_node_ip_address(), nodes)
    finally:
        ray.shutdown()


@contextmanager
def _own_directory() -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            directory = stack.enter_context(make_directory())
        except OSError as error:
            raise ClusterConnectError(
                f"Ray does not start on this machine: it needs a directory in /tmp ({error.strerror}); make /tmp"
                " writable, or leave --ray out to merge without it"
            ) from None
        yield directory


@contextmanager
def _own_token() -> Iterator[None]:
    """Give Ray a token for its processes where it would keep one in a home directory that nobody can write to."""
    home = find_home()
    is_given = any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"))
    if is_given or (home is not None and (os.access(home / ".ray/auth_token", os.R_OK) or is_writable(home / ".ray"))):
        yield
        return
    os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    try:
        yield
    finally:
        del os.environ["RAY_AUTH_TOKEN"]


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


def _check_variable(address: str) -> None:
    """Check the address that `auto` means: Ray itself tries for minutes, and prints a page of its log."""
    if address in ("auto", "local"):
        return
    try:
        _check_address(address)
    except ClusterConnectError as error:
        raise ClusterConnectError(
            f"RAY_ADDRESS names the cluster that `auto` means: {error}; or unset it for the cluster of this machine"
        ) from None


def _explain(address: str, error: Exception) -> str:
    chain = [str(error)]
    cause: BaseException | None = error
    while (cause := cause.__cause__ or cause.__context__ if cause else None) is not None:
        chain.append(str(cause))
    text = "\n".join(chain)
    lines = (str(error).strip() or type(error).__name__).splitlines()
    first = lines[0] if not lines[0].endswith(":") else " ".join(" ".join(lines).split())[:_MAX_SHOWN]
    if address == "local":
        return f"Ray does not start on this machine: {first}; leave --ray out to merge without it"
    if "Could not find any running Ray instance" in text:
        return (
            "no Ray cluster runs on this machine; start one (`ray start --head`), give the address of another machine's"
            " with --address HOST:PORT, or start Ray for this merge alone with --ray"
        )
    if "ersion mismatch" in text:
        return f"the Ray cluster at {address} does not fit to what is installed here: {' '.join(str(error).split())}"
    if "InvalidAuthToken" in text:
        return (
            f"the Ray cluster at {address} asks for a token, and was given none or another one; set RAY_AUTH_MODE=token"
            " and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) as on its head"
        )
    return f"cannot connect to Ray at {address}: {first}; look at `ray status` on the cluster's head"
