"""The GPUs of this machine."""

from __future__ import annotations

import itertools
import os
import threading
from typing import TYPE_CHECKING

from raymerge.pipeline.errors import ConfigError

if TYPE_CHECKING:
    import torch

VARIABLE = "CUDA_VISIBLE_DEVICES"
"""Names the GPUs that a process may use; CUDA reads it when it is first used."""

_TURNS = itertools.count()
_own = threading.local()
"""Has the number of this thread's GPU as `number`."""


def list_gpus() -> list[str]:
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them."""
    import torch

    num_gpus = torch.cuda.device_count()
    named = os.environ.get(VARIABLE, "")
    return named.split(",")[:num_gpus] if named else [str(k) for k in range(num_gpus)]


def require_gpus() -> list[str]:
    """Return the GPUs that this process may use, at least one.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if gpus := list_gpus():
        return gpus
    cuda = torch.version.cuda
    if cuda is None:
        why = f"torch {torch.__version__} is built without CUDA; install one that has it (https://pytorch.org)"
    else:
        why = f"torch {torch.__version__} with CUDA {cuda} sees none; look at nvidia-smi and at {VARIABLE}"
    raise ConfigError(f"--gpu-memory asks for a GPU on {os.uname().nodename}: {why}, or leave --gpu-memory out")


def take_gpu() -> torch.device:
    """Return the GPU of this thread, ready for a task: the threads of a process take turns in choosing theirs.

    Raises:
        ConfigError: there is none.
    """
    import torch

    if not hasattr(_own, "number"):
        _own.number = next(_TURNS) % len(require_gpus())
    device = torch.device("cuda", _own.number)
    torch.cuda.set_device(device)
    return device
