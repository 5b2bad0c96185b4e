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


def find_line(error: BaseException, path: str) -> str:
    """Return the line of a file that an error comes from, as `:12`; nothing where it is in no line."""
    if isinstance(error, SyntaxError):
        return f":{error.lineno}" if error.filename == path else ""
    lines = []
    traceback = error.__traceback__
    while traceback is not None:
        if traceback.tb_frame.f_code.co_filename == path:
            lines.append(traceback.tb_lineno)
        traceback = traceback.tb_next
    return f":{lines[-1]}" if lines else ""
