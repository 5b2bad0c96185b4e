"""RegMean: the linear layers whose outputs are nearest to those of all models, on the inputs that each has seen."""

from __future__ import annotations

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.regression import RIDGE, Regression
from raymerge.ops.registry import Base, Share, Statistics, gram_shape, merge_op

GRAM = Statistics("gram", "Gram matrices", gram_shape, is_whole=True, is_required=False)


@merge_op(title="RegMean", base=Base.INPUT, reference="https://arxiv.org/abs/2212.09849", statistics=GRAM)
def regmean(alpha: Share = 0.9) -> Kernel:
    """The weights of linear layers whose outputs differ least from those of the models, each on its own inputs.

    Each model names a file or a directory with Gram matrices, under `gram`: safetensors with the names of the weights,
    [outputs, inputs], each with X^T X of the layer's inputs X, [inputs, inputs]. Weights without Gram matrices, and
    what is no matrix, get the mean of the models.

    Formula: y^T = (sum(G_i))^-1 sum(G_i x_i^T), where G_i is X_i^T X_i with what is not on its diagonal times
    alpha, plus a ridge of 1e-8 of the mean of the diagonals, so that inputs which no layer has seen are
    averaged.

    When: the inputs of each model's layers can be recorded on some of its data.

    Not when: there is no data, or the largest layer has so many inputs that Gram matrices take too much room.

    Raises:
        OpParameterError: `alpha` is not from 0 to 1; while merging: Gram matrices are none.

    Source: Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", section 3: W =
    (sum(X_i^T X_i))^-1 sum(X_i^T X_i W_i), with alpha = 0.9 for most models; the ridge is raymerge's.
    """
    if not 0 <= alpha <= 1:
        raise OpParameterError(f"alpha = {alpha:g} must be from 0 to 1")
    return Regression(alpha, RIDGE)
