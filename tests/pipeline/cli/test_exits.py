"""Errors at the end of a command."""

from __future__ import annotations

import errno

from raymerge.pipeline.cli.console import StdoutError
from raymerge.pipeline.cli.exits import explain
from raymerge.pipeline.cli.interrupt import MESSAGE
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.progress.events import MergeFailed


def test_errors_are_explained() -> None:
    assert explain(ConfigError("no models")) == MergeFailed("ConfigError", "no models", 2)
    assert explain(ConfigError("no models")).text == "Error: no models"
    assert explain(KeyboardInterrupt()) == MergeFailed("KeyboardInterrupt", MESSAGE, 130)
    assert explain(StdoutError(errno.EPIPE, "gone")).message == "standard output cannot be written: gone"
    assert explain(OSError(errno.ENOSPC, "full")) == MergeFailed("OSError", "full", 2)
    missing = explain(ModuleNotFoundError("No module named 'ray'", name="ray"))
    assert missing.text.startswith("Error: ray is not installed for ")
    assert missing.exit_code == 2
    try:
        raise LookupError("https://me:hidden@host")
    except LookupError as error:
        failed = explain(error)
    assert (failed.type, failed.exit_code) == ("LookupError", 1)
    assert failed.text.startswith("Traceback (most recent call last):\n")
    assert failed.text.endswith("LookupError: https://***@host")
