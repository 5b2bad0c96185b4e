"""KnOTS: TIES in directions that all differences have in common."""

from __future__ import annotations

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.aligned_deltas import AlignedDeltas
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.ops.registry import Base, PerModel, Share, merge_op


@merge_op(title="KnOTS-TIES", base=Base.REQUIRED, reference="https://arxiv.org/abs/2410.19735")
def knots(weight: PerModel[float] = (1.0,), density: PerModel[Share] = (1.0,), lambda_: float = 1.0) -> Kernel:
    """The base plus what TIES makes of all differences, seen in the singular directions that they have in common.

    Differences are written one after the other as columns, [d_1 ... d_n] = U [M_1 ... M_n], with orthogonal columns of
    U and rows of [M_1 ... M_n]. TIES trims, elects and averages the M_i element by element. What is no matrix is merged
    by TIES itself. Without trimming and electing this would be task arithmetic.

    Formula: y = b + lambda * U * ties(M_1 ... M_n) with M_i = U^T d_i, where U has the left singular vectors of
    [d_1 ... d_n], for each matrix.

    When: fine-tunes by LoRA whose adapters were merged into them, of which `ties` keeps little: their differences
    are not aligned element by element.

    Not when: fine-tunes of all weights are aligned as they are; `ties` then gives as much in a fraction of the time.

    Source: Stoica et al. 2025, "Model Merging with SVD to Tie the Knots", section 4, with TIES on S V^T as in the
    authors' code, tensor by tensor.
    """
    return AlignedDeltas(SparseDeltas(weight, density, "magnitude", "sum", True, "none", lambda_))
