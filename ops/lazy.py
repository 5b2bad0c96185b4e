"""Heavy modules, imported when one of their names is first used: ops are declared and planned without them.

Import them from here, at the top of a module: `from raymerge.ops.lazy import np, sum_loops, torch`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch as torch

    sum_loops: Any
    delta_loops: Any
    digest_loops: Any
    low_rank_loops: Any
    rank_loops: Any
    rule_loops: Any
    value_loops: Any
else:

    class _LazyModule:
        def __init__(self, name: str) -> None:
            self._name = name

        def __getattr__(self, name: str) -> Any:
            value = getattr(importlib.import_module(self._name), name)
            setattr(self, name, value)  # found without this method from now on
            return value

    np, torch = _LazyModule("numpy"), _LazyModule("torch")
    delta_loops, digest_loops, low_rank_loops, rank_loops, rule_loops, sum_loops, value_loops = (
        _LazyModule(f"raymerge.ops.loops.{name}_loops")
        for name in ("delta", "digest", "low_rank", "rank", "rule", "sum", "value")
    )

__all__ = [
    "delta_loops",
    "digest_loops",
    "low_rank_loops",
    "np",
    "rank_loops",
    "rule_loops",
    "sum_loops",
    "torch",
    "value_loops",
]
