"""A kernel that needs the whole matrix: the delta, cut down to its largest singular values."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.registry import Base, PerModel, merge_op
from tests.seams.merging import declared_ops, draw, merge_in_every_way, write_model


@dataclass(frozen=True)
class TruncatedDelta(Kernel):
    rank: int

    def grid(self, site: Site) -> int:
        return site.num_elements

    def num_scratch(self, site: Site) -> int:
        return 1

    def state_nbytes(self, site: Site) -> int:
        return 32 * site.num_elements

    def start(self, site: Site) -> KernelRun:
        return _Run(self.rank, site.shape)


@dataclass
class _Run(KernelRun):
    rank: int
    shape: tuple[int, ...]

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base = block.load(0, out)
        delta = block.load(1, block.scratch[0]).sub_(base)
        if len(self.shape) == 2:
            u, s, v = torch.linalg.svd(delta.view(self.shape), full_matrices=False)
            delta = (u[:, : self.rank] * s[: self.rank] @ v[: self.rank]).view(-1)
        out.add_(delta)


def truncated_delta(rank: PerModel[int]) -> Kernel:
    """The base plus the best approximation of the delta that has a rank."""
    return TruncatedDelta(rank[0])


def test_truncated_delta(tmp_path: Path) -> None:
    base, tuned = {"w": draw(600, 300), "norm": draw(5)}, {"w": draw(600, 300, seed=1), "norm": draw(5, seed=1)}
    models = [write_model(tmp_path / name, x) for name, x in (("base", base), ("tuned", tuned))]
    with declared_ops():
        merge_op(title="Truncated", base=Base.REQUIRED, max_models=1)(truncated_delta)
        config = {
            "merge_method": "truncated_delta",
            "base_model": models[0],
            "models": [{"model": models[1], "parameters": {"rank": 3}}],
        }
        merged = merge_in_every_way(config, tmp_path / "out")
    delta = merged["w"] - base["w"]
    assert torch.linalg.matrix_rank(delta, rtol=1e-4) == 3
    smallest = torch.linalg.svdvals((tuned["w"] - base["w"]).double())[3:]  # Eckart and Young: what is lost
    lost = torch.linalg.norm((tuned["w"] - merged["w"]).double())
    torch.testing.assert_close(lost, torch.linalg.norm(smallest), rtol=1e-5, atol=0)
    torch.testing.assert_close(merged["norm"], tuned["norm"])
