"""What can go wrong in running work, as opposed to in the work itself."""

from raymerge import RaymergeError


class StoppedError(RaymergeError):
    """The run was told to stop while this item was in work."""


class WorkerLostError(RaymergeError):
    """A worker ended before its work did."""
