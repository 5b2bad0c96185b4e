"""Where libraries that do a task as a whole keep what they have of an unfinished one."""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from raymerge.cluster.home import make_private_cache
from raymerge.pipeline.evaluation.evaluator import Model, Task


@contextmanager
def keep_unfinished(library: str, model: Model, task: Task) -> Iterator[str | None]:
    """Have a directory in the user's own cache for a model and a task, deleted once the task is done.

    Args:
        library: that writes there, and trusts what it finds.
        model: of the task.
        task: what is done.

    Yields:
        The directory; None where another run has it, or none is safe.
    """
    text = json.dumps([model.digest, task.digest, task.sampling], sort_keys=True)
    directory = make_private_cache(library, hashlib.sha256(text.encode()).hexdigest()[:24])
    if directory is None:
        yield None
        return
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((directory / "lock").open("w"))
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # another run is at it, or has just deleted it
            yield None
            return
        yield str(directory)
        shutil.rmtree(directory, ignore_errors=True)
