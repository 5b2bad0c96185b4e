"""The outcome of an item, as a worker reports it."""

from __future__ import annotations

import pickle
import traceback
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Done:
    """It is done."""

    result: Any


@dataclass(frozen=True, slots=True)
class Failed:
    """It raised."""

    error: BaseException


def make_picklable(error: BaseException) -> BaseException:
    """Return the error, with the traceback that pickling would lose as a note."""
    error.add_note("In a worker process:\n" + "".join(traceback.format_tb(error.__traceback__)))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception(error)))
    return error
