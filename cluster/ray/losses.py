"""Reasons why workers are lost on Ray, and errors for work that Ray cannot run."""

from __future__ import annotations

from collections.abc import Mapping

from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    LocalRayletDiedError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    OwnerDiedError,
    RayError,
    RuntimeEnvSetupError,
    TaskCancelledError,
    WorkerCrashedError,
)

from raymerge.cluster.errors import TaskFailedError

_REASONS: Mapping[type[RayError], str] = {
    OutOfMemoryError: "its node ran out of memory",
    NodeDiedError: "its node died",
    LocalRayletDiedError: "its node died",
    WorkerCrashedError: "its worker died",
    ActorDiedError: "its worker died",
    ActorUnavailableError: "its worker could not be reached",
    OwnerDiedError: "its worker died",
    ObjectLostError: "its answer was lost with a node",
    TaskCancelledError: "its task was cancelled",
    RuntimeEnvSetupError: "its node could not make its environment",
}

LOST = tuple(_REASONS)
"""Losses of workers."""

_NEEDED = (
    "every machine of the cluster needs the same versions of Python and Ray, and what `pip install raymerge` installs,"
    " with the extras that are used"
)


def explain_loss(lost: RayError) -> str:
    """Return how a worker was lost."""
    return next(text for kind, text in _REASONS.items() if isinstance(lost, kind))


def explain(error: RayError) -> str:
    """Return the message for an error that is no loss."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return f"Ray cannot run the work: {lines[-1].strip()}; {_NEEDED}"


def explain_missing(error: BaseException) -> BaseException:
    """Return the error to raise for an error of the work: a machine may lack what it imports."""
    if isinstance(error, ModuleNotFoundError):
        return TaskFailedError(f"{error.name} is not installed on a machine of the cluster; {_NEEDED}")
    return error
