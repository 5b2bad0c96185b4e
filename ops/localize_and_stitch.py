"""Localize-and-Stitch without data: the largest differences of each model, averaged where they meet."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="Localize-and-Stitch (dataless)", base=Base.REQUIRED, reference="https://arxiv.org/abs/2408.13656")
def localize_and_stitch(density: PerModel[Share] = (0.05,), lambda_: float = 1.0) -> Kernel:
    """Keeps the largest differences of each model and adds them, averaged where several models keep theirs.

    Formula: y = b + lambda * sum(m_i d_i) / max(1, sum(m_i)); m_i is 1 for the share density of the largest |d_i| of a
    tensor, else 0.

    When: many models whose few important differences hardly meet, and each of which is to keep its own in full.

    Not when: differences are spread evenly, as after long training: most of them are dropped.

    Source: He et al. 2024, "Localize-and-Stitch", section 4, with the dataless localization: the `density` largest of
    each tensor, where the paper takes those of the whole model.
    """
    return SparseDeltas((1.0,) * len(density), density, "magnitude", "overlap", False, "none", lambda_)
