"""What can be wrong with a merge: config, checkpoints, limits, reading, writing."""

from raymerge import RaymergeError


class ConfigError(RaymergeError, ValueError):
    """The YAML says something that cannot be; the message names the YAML path."""


class CheckpointError(RaymergeError, ValueError):
    """An input checkpoint is malformed or incomplete."""


class TensorMismatchError(RaymergeError, ValueError):
    """Inputs do not fit together: presence, shapes or dtypes of a tensor."""


class MemoryLimitError(RaymergeError, ValueError):
    """The plan needs more memory than it is allowed."""


class FetchError(RaymergeError, OSError):
    """Bytes of an input could not be read, or have changed since the plan was made."""


class OutputError(RaymergeError, OSError):
    """The output could not be written, is in use, or is not what it should be."""
