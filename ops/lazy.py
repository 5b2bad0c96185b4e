"""Heavy modules, imported when one of their names is first used: ops are declared and planned without them.

Import them from here, at the top of a module: `from raymerge.ops.lazy import loops, np, torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch as torch

    loops: Any
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self._name), name)
            setattr(self, name, value)  # found without this method from now on
            return value

    np, torch, loops = (_LazyModule(name) for name in ("numpy", "torch", "raymerge.ops.kernels.loops"))

__all__ = ["loops", "np", "torch"]
