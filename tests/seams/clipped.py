"""An op of one's own, element by element: the file that `--ops` is given."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.registry import Base, merge_op


@merge_op(title="Clipped", base=Base.REQUIRED, max_models=1)
def clipped(limit: float = 1.0) -> Kernel:
    """The model, but no further from the base than a limit."""
    return Elementwise(_clip, (limit,))


def _clip(tensors: Sequence[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], limit: float) -> None:
    base, x = tensors
    out.copy_(x.sub_(base).clamp_(-limit, limit).add_(base))
