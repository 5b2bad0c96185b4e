"""Errors of an op or its parameters."""

from raymerge import RaymergeError


class UnknownOpError(RaymergeError, LookupError):
    """No op has this name."""


class SourceMismatchError(RaymergeError, ValueError):
    """A source must equal source 0, bit for bit, and does not."""

    def __init__(self, source: int) -> None:
        super().__init__(source)
        self.source = source

    def __str__(self) -> str:
        return f"source {self.source} is not the same as source 0"


class IntegerOverflowError(RaymergeError, OverflowError):
    """Integers are added up, and the dtype cannot hold the sum."""


class OpFileError(RaymergeError, ImportError):
    """A file or package that declares ops cannot be loaded."""


class OpParameterError(RaymergeError, ValueError):
    """A parameter's value makes no sense for the op."""
