"""Messages for people, in colour where terminal and user want it: errors, warnings, and hints at what to do next."""

from __future__ import annotations

import json
import os
import re
import sys
from typing import TextIO

_RED, _YELLOW, _DIM, _PLAIN = "\x1b[1;31m", "\x1b[33m", "\x1b[2m", "\x1b[0m"
_COLOURS = {"Error:": _RED, "warning:": _YELLOW}
_LABEL = re.compile(r"^(\S+:\d+: )?(Error:|warning:)(?= )", re.MULTILINE)
"""At the start of a message, or after the line of a file that it is about."""
_SOURCE = re.compile(r"^ +\d+ \| .*$", re.MULTILINE)
"""A line of the config, as a message shows it."""


class StdoutError(OSError):
    """Standard output takes no more."""


def say(text: str, *, stream: TextIO | None = None) -> None:
    """Print a message to stderr, or to another stream; its label, if it has one, in colour."""
    stream = stream or sys.stderr
    print(paint(text, stream), file=stream, flush=True)


def put(text: str) -> None:
    """Print what a command was asked for to stdout: names, sizes, JSON, wherever they come from.

    Raises:
        StdoutError: stdout cannot be written.
    """
    shown = printable(text)
    try:
        print(shown, flush=True)
    except OSError as error:
        raise StdoutError(error.errno, error.strerror) from error


def say_hint(text: str) -> None:
    """Print to stderr what can be done next, less bright than other text."""
    shown = printable(text)
    print(f"{_DIM}{shown}{_PLAIN}" if has_colour(sys.stderr) else shown, file=sys.stderr, flush=True)


def paint(text: str, stream: TextIO) -> str:
    """Return a message as a stream is to show it."""
    shown = printable(text)
    if not has_colour(stream):
        return shown
    shown = _LABEL.sub(lambda match: f"{match[1] or ''}{_COLOURS[match[2]]}{match[2]}{_PLAIN}", shown)
    return _SOURCE.sub(lambda match: f"{_DIM}{match[0]}{_PLAIN}", shown)


def has_colour(stream: TextIO) -> bool:
    """Tell whether a stream shows colours: not under NO_COLOR, always under FORCE_COLOR, else on terminals."""
    if os.environ.get("NO_COLOR"):
        return False
    return bool(os.environ.get("FORCE_COLOR")) or (stream.isatty() and os.environ.get("TERM") != "dumb")


def printable(text: str) -> str:
    """Return text that does nothing to a terminal, wherever it comes from; JSON stays JSON, and says the same."""
    if text.isascii() and text.isprintable():
        return text
    return "".join(sign if sign.isprintable() or sign in "\n\t" else json.dumps(sign)[1:-1] for sign in text)
