"""Deltas shared out among the models that changed an element."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.elementwise import combine_by_rule
from raymerge.ops.lazy import np, rule_loops, sum_loops, torch
from raymerge.ops.stored import LOOP_DTYPES, PIECE_ELEMENTS, RunAll, Slot, Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True)
class ChangedDeltas(Kernel):
    """y = base + the mean of those deltas that are larger than epsilon; a single one is multiplied by a growth.

    A model's growth is 1 + rate * min(limit, shared / unique), from how many elements of the tensor it changed together
    with other models, and how many by itself.
    """

    family = "deltas"
    loop_dtypes = LOOP_DTYPES
    epsilon: float
    rate: float = 0.0
    limit: float = 0.0

    def num_passes(self, site: Site) -> int:
        """Return one, to count, if deltas grow."""
        return int(self.rate != 0 and site.num_sources > 1)

    def num_scratch(self, site: Site) -> int:
        """The base, a spare, counts, the one model that changed an element, and all deltas."""
        return 3 + site.num_sources

    def measuring(self, site: Site) -> Hashable:
        """Return the threshold of a change, where changes are counted."""
        return (ChangedDeltas, self.epsilon) if self.num_passes(site) else ChangedDeltas

    def start(self, site: Site) -> KernelRun:
        """Begin; there are two numbers for each model."""
        num_models = site.num_sources - 1
        return _ChangedDeltasRun(self, site, [0] * num_models, [0] * num_models)


@dataclass
class _ChangedDeltasRun(KernelRun):
    kernel: ChangedDeltas
    site: Site
    num_changed: list[int]
    """Elements that each model changed."""
    num_unique: list[int]
    """Number of changed elements that no other model changed."""

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, ChangedDeltas)
        return _ChangedDeltasRun(kernel, self.site, self.num_changed, self.num_unique)

    def measure(self, index: int, block: Block) -> None:
        base, is_changed, count, changer, delta = block.scratch[:5]
        block.load(0, base)
        count.zero_()
        changer.zero_()
        models = range(1, self.site.num_sources)
        counts = []
        for model in models:
            self._find_changed(block, model, base, delta, is_changed)
            counts.append(is_changed.count_nonzero())
            count.add_(is_changed)
            changer.add_(is_changed.mul_(model))
        changer.mul_(torch.eq(count, 1, out=is_changed))
        counts += [torch.eq(changer, model, out=is_changed).count_nonzero() for model in models]
        found = torch.stack(counts).cpu().tolist()
        self.num_changed = [a + b for a, b in zip(self.num_changed, found[: len(models)], strict=True)]
        self.num_unique = [a + b for a, b in zip(self.num_unique, found[len(models) :], strict=True)]

    def end_pass(self, index: int) -> None:
        pass

    def combine(self, block: Block, out: torch.Tensor) -> None:
        base, spare, count, unique, *deltas = block.scratch
        block.load(0, base)
        count.zero_()
        for model, delta in enumerate(deltas, start=1):
            self._find_changed(block, model, base, delta, spare)
            count.add_(spare)
            delta.mul_(spare)
        is_unique = torch.eq(count, 1, out=unique.view(torch.bool)[: len(count)])
        count.clamp_(min=1)
        out.zero_()
        for delta, growth in zip(deltas, self._find_growths(), strict=True):
            if growth != 1:
                torch.where(is_unique, torch.mul(delta, growth, out=spare), delta, out=delta)
            out.add_(delta.div_(count))
        out.add_(base)

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        return combine_by_rule(stored, "share_changes", (self.kernel.epsilon, *self._find_growths()), out)

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        for counts in run_all([partial(self._count, piece) for piece in stored.split(PIECE_ELEMENTS)]):
            changed, unique = counts.tolist()
            self.num_changed = [a + b for a, b in zip(self.num_changed, changed, strict=True)]
            self.num_unique = [a + b for a, b in zip(self.num_unique, unique, strict=True)]

    def _count(self, stored: Stored) -> NDArray[np.int64]:
        """Return for each model how many elements it changed, and how many of them it alone."""
        counts = np.zeros((2, len(self.num_changed)), np.int64)
        where = np.float32(self.kernel.epsilon), stored.num_elements
        rule_loops.count_changes(*stored.sources(), *where, counts, sum_loops.make_scratch(len(stored.dtypes) + 1))
        return counts

    def _find_changed(
        self, block: Block, model: int, base: torch.Tensor, delta: torch.Tensor, is_changed: torch.Tensor
    ) -> None:
        """Write a model's delta, and 1 where it is larger than epsilon and 0 elsewhere."""
        block.load(model, delta).sub_(base)
        torch.gt(torch.abs(delta, out=is_changed), self.kernel.epsilon, out=is_changed)

    def _find_growths(self) -> list[float]:
        """Source: "Reinforced Agent Merging" 2026 (arXiv 2601.13572), RAM+."""
        growths = []
        for num_changed, num_unique in zip(self.num_changed, self.num_unique, strict=True):
            share = (num_changed - num_unique) / (max(num_unique, self.kernel.epsilon) or 1)
            growths.append(1 + self.kernel.rate * min(max(share, 0.0), self.kernel.limit))
        return growths

    def figures(self) -> Mapping[str, float]:
        """Return the shares of elements that each model changed, and that it changed alone, from `changed[0]` on."""
        if not self.kernel.num_passes(self.site):
            return {}
        figures = {}
        for name, counts in (("changed", self.num_changed), ("unique", self.num_unique)):
            for position, number in enumerate(counts):
                figures[f"{name}[{position}]"] = number / max(1, self.site.num_elements)
        return figures
