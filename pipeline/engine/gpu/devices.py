"""The GPUs of this machine."""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import itertools
import os
import threading
from contextlib import suppress
from pathlib import Path
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
    """Return the GPUs that this process may use, as `CUDA_VISIBLE_DEVICES` names them.

    The driver's library is asked where there is one: it answers in milliseconds, and CUDA is not started.
    """
    count = _count_installed()
    if count is None:
        import torch

        count = torch.cuda.device_count()
    named = os.environ.get(VARIABLE)
    if named is None:
        return [str(k) for k in range(count)]
    names = [name.strip() for name in named.split(",")]
    return list(itertools.takewhile(lambda name: _is_there(name, count), names))  # as CUDA does, up to a wrong one


def require_gpus() -> list[str]:
    """Return the GPUs that this process may use, at least one.

    Raises:
        ConfigError: there is none, or torch cannot use any.
    """
    gpus = list_gpus()
    if gpus and _has_cuda():
        return gpus
    import torch

    cuda = torch.version.cuda
    if cuda is None:
        why = f"torch {torch.__version__} is built without CUDA; install one that has it (https://pytorch.org)"
    else:
        why = f"torch {torch.__version__} with CUDA {cuda} sees none; look at nvidia-smi and at {VARIABLE}"
    raise ConfigError(f"--gpu-memory asks for a GPU on {os.uname().nodename}: {why}, or leave --gpu-memory out")


def start_cuda() -> None:
    """Start CUDA on the first GPU that this process may use, while what merges there is imported.

    Whatever fails here fails again where it can be explained.
    """
    context = threading.Thread(target=_make_context, name="cuda", daemon=True)
    context.start()
    with suppress(Exception):
        import torch

        importlib.import_module("raymerge.pipeline.engine.gpu.merger")
        context.join()
        torch.zeros(1, device="cuda").add_(1).cpu()  # torch and its allocator, and the first kernel


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


def _count_installed() -> int | None:
    """Return the number of GPUs of this machine; None where the driver's library is not at hand."""
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return None
    count = ctypes.c_uint()
    try:
        if library.nvmlInit_v2() or library.nvmlDeviceGetCount_v2(ctypes.byref(count)):
            return None
        library.nvmlShutdown()
    except AttributeError:
        return None
    return count.value


def _is_there(name: str, count: int) -> bool:
    """Return whether a name of `CUDA_VISIBLE_DEVICES` may mean a GPU."""
    return int(name) < count if name.isdigit() else name.startswith(("GPU-", "MIG-"))


def _has_cuda() -> bool:
    """Return whether torch is built with CUDA, without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        return False
    return any((Path(found.origin).parent / "lib").glob("*torch_cuda*"))


def _make_context() -> None:
    """Make the context that torch will use: without the interpreter lock, which imports hold most of the time."""
    with suppress(OSError, AttributeError):
        cuda = ctypes.CDLL("libcuda.so.1")
        device, context = ctypes.c_int(), ctypes.c_void_p()
        if cuda.cuInit(0) == 0 and cuda.cuDeviceGet(ctypes.byref(device), 0) == 0:
            cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
