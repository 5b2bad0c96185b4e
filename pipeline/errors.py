"""Errors of a merge: config, checkpoints, limits, reading, writing."""

from raymerge import RaymergeError
from raymerge.pipeline.redact import redact


class MergeError(RaymergeError):
    """Base of these errors; credentials never get into their messages."""

    def __init__(self, message: str) -> None:
        super().__init__(redact(message))


class ConfigError(MergeError, ValueError):
    """The YAML, an option or a URL says something that cannot be; the message names the YAML path."""


class CheckpointError(MergeError, ValueError):
    """An input checkpoint is malformed or incomplete."""


class AdapterGivenError(CheckpointError):
    """A LoRA adapter is where a model is needed."""


class TensorMismatchError(MergeError, ValueError):
    """Inputs do not fit together: presence, shapes or dtypes of a tensor."""


class MemoryLimitError(MergeError, ValueError):
    """The plan needs more memory than it is allowed."""


class FetchError(MergeError, OSError):
    """Bytes of an input could not be read, or have changed since the plan was made."""


class OutputError(MergeError, OSError):
    """The output could not be written, is in use, or is not what it should be."""


class HeldError(OutputError):
    """Another run is writing to the output."""


class CorruptedError(OutputError):
    """An upload went wrong, or a store has something else than it was sent; doing it again may help."""

    num_attempts = 6
    """Attempts that are worth making, the first included."""


class StalledError(CorruptedError):
    """An upload has taken minutes, and the store answers other requests."""

    num_attempts = 2
