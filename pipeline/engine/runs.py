"""One output tensor while it is merged: the runs of its variants."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernel import KernelRun
from raymerge.pipeline.checkpoint.adapters.updates import APPLY
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.plan.types import TensorMerge

Figures = dict[str, Mapping[str, float]]
"""Figures that kernels have measured of each tensor, by its name."""


class TensorRuns:
    """The runs of a tensor's variants. Those that measure the same measure once: one of them leads."""

    def __init__(self, merge: TensorMerge) -> None:
        self.merge = merge
        sites = [(variant.kernel, merge.site(variant)) for variant in merge.variants]
        self.num_passes = max(kernel.num_passes(site) for kernel, site in sites)
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for position, (kernel, site) in enumerate(sites):
            groups[kernel.measuring(site), site.seed].append(position)
        self._groups = list(groups.values())
        self._leaders = [sites[group[0]][0].start(sites[group[0]][1]) for group in self._groups]
        self._pass_counts = [sites[group[0]][0].num_passes(sites[group[0]][1]) for group in self._groups]
        self._runs: list[KernelRun] = []

    def measuring_runs(self, index: int) -> Iterable[tuple[int, KernelRun]]:
        """Yield the runs that take measuring pass `index`, each with the position of its variant."""
        for leader, group, num_passes in zip(self._leaders, self._groups, self._pass_counts, strict=True):
            if index < num_passes:
                yield group[0], leader

    def end_pass(self, index: int) -> None:
        """Evaluate measuring pass `index`.

        Raises:
            OpParameterError: what was measured leaves the op no answer.
        """
        for _, run in self.measuring_runs(index):
            try:
                run.end_pass(index)
            except OpParameterError as error:
                raise self.explain_refusal(error) from error

    def combining_runs(self) -> Sequence[KernelRun]:
        """Return the run of each variant, after the last measuring pass."""
        if not self._runs:
            runs: dict[int, KernelRun] = {}
            for leader, (first, *others) in zip(self._leaders, self._groups, strict=True):
                runs[first] = leader
                runs |= {position: leader.share(self.merge.variants[position].kernel) for position in others}
            self._runs = [runs[position] for position in range(len(runs))]
        return self._runs

    def note_figures(self, figures: Sequence[Figures]) -> None:
        """Enter what has been measured of the tensor, for each output."""
        for found, run in zip(figures, self.combining_runs(), strict=True):
            found[self.merge.name] = run.figures()

    def explain_refusal(self, error: OpParameterError) -> OpParameterError:
        """Return the error for values that leave the op no answer, with the tensor's name."""
        return OpParameterError(f"{self.merge.op}, tensor {self.merge.name}: {error}")

    def explain_difference(self, source: int) -> TensorMismatchError:
        """Return the error for a source that should equal source 0."""
        merge = self.merge
        first, other = merge.sources[0], merge.sources[source]
        if DTYPES[merge.out_dtype].is_mergeable:
            return TensorMismatchError(
                f"{merge.name}, which updates are added to, differs between {first.model} and {other.model}: the"
                f" adapters are for different models, or for vocabularies that differ; {APPLY}"
            )
        return TensorMismatchError(
            f"{merge.name} ({merge.out_dtype}, not floating-point) differs between {first.model} and {other.model};"
            " such tensors are not merged, only copied: to take those of the base, or else of the first model, add"
            " `integers: donor` to the config, or `max` or `sum` to combine them"
        )
