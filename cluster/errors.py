"""Errors in running work, as opposed to errors of the work itself."""

from raymerge import RaymergeError


class StoppedError(RaymergeError):
    """The run was told to stop while this item was in work."""


class WorkerLostError(RaymergeError):
    """A worker ended before its work did."""


class ClusterConnectError(RaymergeError):
    """There is no Ray cluster at an address, it refuses us, or it does not fit to what is installed here."""


class HeadLostError(RaymergeError):
    """The head of a Ray cluster does not answer any more."""


class ResourceError(RaymergeError):
    """No node of the cluster has what an item needs."""


class NoHomeError(RaymergeError):
    """A path in the user's home directory is needed, and the user has none."""


class TaskFailedError(RaymergeError):
    """Ray could not run the work of an item at all."""


class ManifestError(RaymergeError):
    """A manifest cannot be made so that the scheduler would take it."""

    def __init__(self, problem: str, field: str = "") -> None:
        """Make the error; `field` names the field of the job or target with the wrong value, if there is one."""
        super().__init__(problem)
        self.field = field


class JobError(RaymergeError):
    """A cluster cannot do what is asked of it about a job."""
