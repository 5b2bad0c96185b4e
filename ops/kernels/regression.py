"""Linear layers by regression: weighted by the inner products of their inputs, which are statistics of each model."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.linear import combine_linearly
from raymerge.ops.kernels.matrix import BLAS_NBYTES, count_strip_rows
from raymerge.ops.lazy import torch

RIDGE = 1e-8
"""Added to the diagonals, as a share of their mean."""
_LARGEST_SKEW = 1e-2
"""Largest difference of a Gram matrix to its transpose, as a share of its norm; rounding to bfloat16 makes 4e-3."""
_NUM_SQUARES = 6
"""Matrices of the Gram matrices' size, in float64, that are there at once."""


@dataclass(frozen=True)
class Regression(Kernel):
    """y = x_1 + sum((x_i - x_1) C_i) with C_i = G_i (sum(G_j))^-1; the mean of tensors without Gram matrices."""

    alpha: float
    """Factor of what is not on the diagonal of a Gram matrix."""
    ridge: float

    family = "matrices"
    tolerance = 1e-5

    def grid(self, site: Site) -> int:
        """The whole matrix, if it is one that has Gram matrices."""
        return site.num_elements if site.num_statistics else BLOCK_ELEMENTS

    def num_scratch(self, site: Site) -> int:
        """The first model and the difference of another one to it; or a model."""
        return 2 if site.num_statistics else 1

    def state_nbytes(self, site: Site) -> int:
        """The Gram matrices' sum and its factor, and what is made of one Gram matrix at a time."""
        if not site.num_statistics:
            return 0
        size = site.shape[1]
        return BLAS_NBYTES + 8 * (_NUM_SQUARES * size**2 + 3 * count_strip_rows(size) * size)

    def start(self, site: Site) -> KernelRun:
        """Begin; nothing is kept between blocks."""
        return _RegressionRun(self, site)


@dataclass(frozen=True)
class _RegressionRun(KernelRun):
    kernel: Regression
    site: Site

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, Regression)
        return _RegressionRun(kernel, self.site)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        if not self.site.num_statistics:
            combine_linearly(block, (1.0,) * self.site.num_sources, out)
            out.div_(torch.full((), self.site.num_sources, dtype=out.dtype, device=out.device))
            return
        num_models = self.site.num_statistics
        size = self.site.shape[1]
        total = torch.zeros(size, size, dtype=torch.float64, device=out.device)
        for model in range(num_models):
            total.add_(self._load_gram(block, model, out.device))
        mean = total.diagonal().mean().item()
        ridge = self.kernel.ridge * mean / num_models if mean else 1.0
        total.diagonal().add_(ridge * num_models)
        factor, failure = torch.linalg.cholesky_ex(total)
        del total
        if failure.item():
            raise OpParameterError("the sum of the Gram matrices is not positive definite; they hold no inner products")
        first, delta = block.scratch
        block.load(0, first)
        out.copy_(first)
        for model in range(1, num_models):
            block.load(model, delta).sub_(first)
            gram = self._load_gram(block, model, out.device)
            gram.diagonal().add_(ridge)
            weights = torch.cholesky_solve(gram, factor).T
            del gram
            step = count_strip_rows(size)
            for start in range(0, self.site.shape[0], step):
                rows = delta.view(-1, size)[start : start + step]
                out.view(-1, size)[start : start + step].add_(rows.double() @ weights)
            del weights

    def _load_gram(self, block: Block, model: int, device: torch.device) -> torch.Tensor:
        """Return a model's Gram matrix in float64, with what is not on its diagonal times alpha."""
        size = self.site.shape[1]
        stored = torch.empty(size * size, dtype=torch.float32, device=device)
        gram = block.load(self.site.num_sources - self.site.num_statistics + model, stored).view(size, size).double()
        del stored
        diagonal = gram.diagonal().clone()
        norm = gram.norm()
        is_skew = (gram - gram.T).norm() > _LARGEST_SKEW * norm
        if is_skew or not norm.isfinite() or (diagonal < 0).any():
            wrong = "not symmetric" if is_skew else "negative on its diagonal"
            if not norm.isfinite():
                wrong = "not finite, perhaps too large for the dtype that it was stored in"
            raise OpParameterError(f"the Gram matrix of model {model + 1} is {wrong}; it holds no inner products")
        gram.mul_(self.kernel.alpha).diagonal().copy_(diagonal)
        return gram
