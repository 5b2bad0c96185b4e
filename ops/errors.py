"""What can be wrong with an op or its parameters."""

from raymerge import RaymergeError


class UnknownOpError(RaymergeError, LookupError):
    """No op has this name."""


class OpParameterError(RaymergeError, ValueError):
    """A parameter's value makes no sense for the op."""
