"""Task arithmetic on thinned-out deltas: one kernel for the whole family."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import BLOCK_ELEMENTS, Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.delta import Delta, combine_block, combine_deltas
from raymerge.ops.kernels.linear import combine_stored
from raymerge.ops.kernels.sparsifiers.random import RandomSparsifier
from raymerge.ops.kernels.sparsifiers.ranks import RankSparsifier, count_row_block, measure_ranking
from raymerge.ops.kernels.sparsifiers.select import (
    CUT_NBYTES,
    SELECTION_TEMPORARY_NBYTES,
    MagnitudeSparsifier,
    measure_together,
)
from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier
from raymerge.ops.lazy import torch
from raymerge.ops.stored import LOOP_DTYPES, RunAll, Slot, Stored
from raymerge.ops.sums import add_blocks

Rescale = Literal["none", "l1", "inverse_density"]

SMALLEST_DIVISOR = 1e-8
"""A smaller sum of all weights does not divide."""


@dataclass(frozen=True)
class SparseDeltas(Kernel):
    """y = base + scale * consensus(w_i * mask_i * (x_i - base)).

    Deltas are formed in the compute dtype, in which the difference of two bfloat16 numbers of similar size is exact.
    """

    family = "deltas"
    weights: tuple[float, ...]
    densities: tuple[float, ...]
    """Share of each delta that is kept; 1 and more keep all, 0 and less nothing. One value holds for all models."""
    sparsifier: Literal["none", "magnitude", "random", "ranks"]
    """The elements that are kept: all, those of some sizes, randomly chosen ones, or such by their ranks in rows."""
    consensus: Literal["none", "sum", "overlap"]
    """Add all that is kept, or only what has the sign of the sum, or average what is not zero."""
    normalize: bool
    """Divide by the weights that took part."""
    rescale: Rescale
    """Give each thinned delta the sum of absolute values that it had before, or divide by the density."""
    scale: float
    """The YAML's `lambda`."""
    gammas: tuple[float, ...] = (0.0,)
    """Share of each delta that is dropped as outliers, by magnitude. One value holds for all models."""
    epsilons: tuple[float, ...] = (0.0,)
    """By how much the probabilities of keeping the smallest and largest of a row differ. One value holds for all."""

    def __post_init__(self) -> None:
        """Refuse what makes no sense.

        Raises:
            OpParameterError: a share of outliers is none, or probabilities are.
        """
        for density, epsilon in zip(self._densities(), spread(self.epsilons, len(self.weights)), strict=True):
            least, most = density - abs(epsilon), density + abs(epsilon)
            if self.sparsifier == "ranks" and 0 < density < 1 and not 0 < least <= most < 1:
                between = f"density lies between {abs(epsilon):g} and {1 - abs(epsilon):g} (or is 1)"
                raise OpParameterError(
                    f"density {density} and epsilon {epsilon} give probabilities from {least:g} to {most:g}, which must"
                    f" be more than 0 and less than 1; {f'with this epsilon {between}, ' if abs(epsilon) < 0.5 else ''}"
                    f"with this density epsilon is less than {min(density, 1 - density):g}"
                )
        for gamma in self.gammas:
            if not 0 <= gamma <= 1:
                raise OpParameterError(
                    f"gamma = {gamma} is outside of 0 to 1, the share of each delta that is dropped as outliers"
                )

    @property
    def scale_of_sum(self) -> float:
        """Factor of the sum of all weighted deltas, whether or not they agree on a sign."""
        total = sum(self.weights) if self.normalize else 1.0
        return self.scale / (total if abs(total) >= SMALLEST_DIVISOR else 1.0)

    @property
    def loop_dtypes(self) -> tuple[str, ...]:  # type: ignore[override]  # of a kernel, not of a class
        """There are none yet for the reciprocals of probabilities that follow from ranks."""
        return () if self.sparsifier == "ranks" and self.rescale == "inverse_density" else LOOP_DTYPES

    @property
    def is_random(self) -> bool:
        """Whether deltas are thinned out at random."""
        return self.sparsifier in ("random", "ranks") and any(self._thinned())

    def grid(self, site: Site) -> int:
        """Return the usual block, or whole rows where elements are ranked in them."""
        return count_row_block(site) if self.sparsifier == "ranks" else BLOCK_ELEMENTS

    def num_passes(self, site: Site) -> int:
        """Return the sparsifier's passes, and one more to rescale."""
        if not any(self._thinned()):
            return 0
        return (2 if self.sparsifier == "magnitude" else 0) + (self.rescale == "l1")

    def num_scratch(self, site: Site) -> int:
        """The base, two spares, and one delta; all deltas if they are to agree on a sign, or their weights."""
        return 3 + max(1, site.num_sources - 1) if self.consensus == "sum" else 4 + (self.consensus == "overlap")

    def state_nbytes(self, site: Site) -> int:
        """Histograms and collected bits of every model that is trimmed by magnitude; or what ranking takes."""
        if self.sparsifier == "ranks" and any(self._thinned()):
            return measure_ranking(site)
        if self.sparsifier != "magnitude" or not self.num_passes(site):
            return 0
        num_cuts = 1 + any(gamma > 0 for gamma in self.gammas)
        return (site.num_sources - 1) * num_cuts * CUT_NBYTES + SELECTION_TEMPORARY_NBYTES

    def measuring(self, site: Site) -> Hashable:
        """The sparsification alone: which deltas are thinned out, how much and how; neither weights nor scale."""
        return SparseDeltas, self.sparsifier, self.rescale, self._thinned(), self.gammas, self.epsilons

    def start(self, site: Site) -> KernelRun:
        """Begin with one tensor."""
        models = []
        for source, (weight, density) in enumerate(zip(self.weights, self._densities(), strict=True), start=1):
            if weight != 0 and density > 0:
                is_uniform = self.rescale == "inverse_density" and self.sparsifier == "random"
                rescaling = 1 / min(density, 1.0) if is_uniform else 1.0
                models.append(Delta(source, weight, self._make_sparsifier(site, source - 1, density), rescaling))
        return _SparseDeltasRun(self, site, models)

    def _thinned(self) -> tuple[float, ...]:
        """Return the densities of the deltas that a sparsifier is needed for, 0 for those that are kept or left out."""
        densities = zip(self.weights, self._densities(), strict=True)
        return tuple(density if weight != 0 and 0 < density < 1 else 0.0 for weight, density in densities)

    def _densities(self) -> tuple[float, ...]:
        if self.sparsifier == "none":
            return (1.0,) * len(self.weights)
        return spread(self.densities, len(self.weights))

    def _make_sparsifier(self, site: Site, position: int, density: float) -> Sparsifier | None:
        if density >= 1:
            return None
        if self.sparsifier == "magnitude":
            num_kept = max(1, int(density * site.num_elements))
            gamma = spread(self.gammas, len(self.weights))[position]
            num_outliers = min(int(gamma * site.num_elements), site.num_elements - num_kept)
            return MagnitudeSparsifier(num_kept, max(0, num_outliers))
        if self.sparsifier == "ranks":
            epsilon = spread(self.epsilons, len(self.weights))[position]
            is_rescaling = self.rescale == "inverse_density"
            return RankSparsifier(density, epsilon, is_rescaling=is_rescaling, site=site, position=position)
        return RandomSparsifier(density, seed=site.seed, name=site.name, position=position)


def spread(values: tuple[float, ...], num_models: int) -> tuple[float, ...]:
    """Return a value for each model, where one may hold for all."""
    return values * num_models if len(values) == 1 else values


class _SparseDeltasRun(KernelRun):
    def __init__(self, kernel: SparseDeltas, site: Site, models: list[Delta]) -> None:
        self._kernel = kernel
        self._site = site
        self._models = models

    def share(self, kernel: Kernel) -> KernelRun:
        run = kernel.start(self._site)
        assert isinstance(run, _SparseDeltasRun)
        measured = {model.source: model for model in self._models}
        for model in run._models:
            if model.sparsifier is not None:
                model.take(measured[model.source])
        return run

    def measure(self, index: int, block: Block) -> None:
        base, first, second, delta = block.scratch[:4]
        is_loaded = False
        for model in self._models:
            sparsifier = model.sparsifier
            if sparsifier is None:
                continue
            if not is_loaded:
                block.load(0, base)
                is_loaded = True
            block.load(model.source, delta).sub_(base)
            if index < sparsifier.num_passes:
                sparsifier.measure(index, delta, (first, second))
            else:
                block_elements = self._kernel.grid(self._site)
                model.full_sum = add_blocks(model.full_sum, delta.abs_(), block_elements)
                sparsifier.trim(block.start, delta, (first, second))
                model.kept_sum = add_blocks(model.kept_sum, delta, block_elements)

    def end_pass(self, index: int) -> None:
        for model in self._models:
            if model.sparsifier is not None and index < model.sparsifier.num_passes:
                model.sparsifier.end_pass(index)

    def figures(self) -> Mapping[str, float]:
        """Return the figures of each delta, the first model's as `name[0]`.

        `kept` is the share of its elements that are kept and not zero, `threshold` the smallest of them, and `kept_sum`
        their share of the sum of absolute values.
        """
        figures = {}
        for model in self._models:
            found = dict(model.sparsifier.figures()) if model.sparsifier is not None and self._site.num_elements else {}
            if "kept" in found:
                found["kept"] /= self._site.num_elements
            if model.full_sum:
                found["kept_sum"] = model.kept_sum / model.full_sum
            figures.update({f"{name}[{model.source - 1}]": value for name, value in found.items()})
        return figures

    def combine(self, block: Block, out: torch.Tensor) -> None:
        if not self._models:
            block.load(0, out)
        else:
            combine_block(self._models, self._make_rule(), self._kernel.consensus, self._kernel.normalize, block, out)

    def _weigh(self) -> tuple[list[float], float, float]:
        """Return the factor of each delta, the weight they have in common, and the scale of their sum.

        Factors that all deltas have in common are taken out of the sum: that spares products.
        """
        scale, models = self._kernel.scale, self._models
        if self._kernel.consensus == "sum":
            weights = {model.weight for model in models}
            common = models[0].weight if models[0].weight > 0 and len(weights) == 1 else 1.0
            factors = [model.weight / common * model.rescaling for model in models]
            return factors, common, scale if self._kernel.normalize else scale * common
        scale = self._kernel.scale_of_sum
        coefficients = [model.weight * model.rescaling * scale for model in models]
        if len(set(coefficients)) == 1:
            return [1.0] * len(models), 1.0, coefficients[0]
        return coefficients, 1.0, 1.0

    def measure_stored(self, index: int, stored: Stored, run_all: RunAll) -> None:
        run_all([partial(model.measure_stored, index, stored) for model in self._models])

    def measure_outputs(self, index: int, runs: Sequence[KernelRun], stored: Stored, run_all: RunAll) -> None:
        selections: dict[int, list[MagnitudeSparsifier]] = {}
        for model in (model for run in self._find_alike(runs) for model in run._models):
            if isinstance(model.sparsifier, MagnitudeSparsifier) and index < model.sparsifier.num_passes:
                selections.setdefault(model.source, []).append(model.sparsifier)
        if not selections:
            super().measure_outputs(index, runs, stored, run_all)
            return
        run_all([partial(measure_together, index, found, stored, source) for source, found in selections.items()])

    def _find_alike(self, runs: Sequence[KernelRun]) -> list[_SparseDeltasRun]:
        """Return runs as they are if all differ from this one in numbers alone, and else none."""
        rule = self._kernel.sparsifier, self._kernel.consensus
        own = [run for run in runs if isinstance(run, _SparseDeltasRun)]
        alike = [run for run in own if (run._kernel.sparsifier, run._kernel.consensus) == rule]
        return alike if len(alike) == len(runs) else []

    def fork(self, pieces: Sequence[Stored], run_all: RunAll) -> Sequence[KernelRun]:
        forks = [model.fork(pieces, run_all) for model in self._models]
        runs = [copy.copy(self) for _ in pieces]
        for position, run in enumerate(runs):
            run._models = [models[position] for models in forks]
        return runs

    def combine_stored(self, stored: Stored, out: Slot) -> float:
        [finished] = self._combine_alike([self], stored, [out])
        return finished

    def combine_outputs(self, runs: Sequence[KernelRun], stored: Stored, outs: Sequence[Slot]) -> Sequence[float]:
        own = self._find_alike(runs)
        if not own or self._kernel.sparsifier == "ranks":  # each makes masks as large as the tensor
            return super().combine_outputs(runs, stored, outs)
        groups: dict[Hashable, list[int]] = {}
        for position, run in enumerate(own):
            groups.setdefault((*(model.source for model in run._models), run._kernel.normalize), []).append(position)
        finished = [0.0] * len(runs)
        for group in groups.values():
            found = self._combine_alike([own[k] for k in group], stored, [outs[k] for k in group])
            for position, each in zip(group, found, strict=True):
                finished[position] = each
        return finished

    def _combine_alike(self, runs: Sequence[_SparseDeltasRun], stored: Stored, outs: Sequence[Slot]) -> Sequence[float]:
        """Do so for runs that are alike, and differ in neither sources nor `normalize`."""
        models = [run._models for run in runs]
        if not models[0]:
            return combine_stored(stored, [(1.0,)] * len(outs), outs, [1.0] * len(outs))
        consensus = ("none", "sum", "overlap").index(self._kernel.consensus)
        rules = [run._make_rule() for run in runs]
        return combine_deltas(models, rules, consensus, runs[0]._kernel.normalize, stored, outs)

    def _make_rule(self) -> tuple[list[float], list[float], float]:
        """Return the factor of each delta, the weights of the models, and the scale of the sum."""
        factors, common, scale = self._weigh()
        return factors, [model.weight / common for model in self._models], scale
