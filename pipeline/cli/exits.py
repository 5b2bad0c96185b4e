"""Messages and exit codes of errors that end a command."""

from __future__ import annotations

import errno
import sys
import traceback
from pathlib import Path

from raymerge import RaymergeError
from raymerge.pipeline.cli.console import StdoutError
from raymerge.pipeline.cli.interrupt import MESSAGE
from raymerge.pipeline.progress.events import MergeFailed
from raymerge.pipeline.redact import redact


def explain(error: BaseException) -> MergeFailed:
    """Return the message and exit code for an error that ends a command."""
    if isinstance(error, RaymergeError):
        return MergeFailed(type(error).__name__, redact(str(error)), 2)
    if isinstance(error, KeyboardInterrupt):
        return MergeFailed(KeyboardInterrupt.__name__, MESSAGE, 130)
    if isinstance(error, ModuleNotFoundError):
        text = f"{error.name} is not installed for {sys.executable}; install raymerge there again, with what it needs"
        return MergeFailed(type(error).__name__, text, 2)
    if isinstance(error, OSError) and (text := _explain_os(error)):
        return MergeFailed(type(error).__name__, redact(text), 2)
    text = "".join(traceback.format_exception(error)).rstrip()
    return MergeFailed(type(error).__name__, redact(text), 1)


def _explain_os(error: OSError) -> str:
    """Name the refusal of this machine behind an error; empty where it may be a mistake of ours."""
    if isinstance(error, StdoutError):
        return f"standard output cannot be written: {error.strerror}"
    if error.filename is not None:
        return f"{error.filename!s}: {error.strerror}"
    try:
        Path.cwd()
    except FileNotFoundError:
        return "the working directory was deleted; change to a directory that is there"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE):
        return error.strerror or str(error)
    return ""
