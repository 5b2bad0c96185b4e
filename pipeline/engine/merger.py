"""Turns the windows of a task into the tensors of its outputs, in the order in which they come."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch

from raymerge.ops.decoder import Raw, find_dtype
from raymerge.ops.errors import SourceMismatchError
from raymerge.ops.kernel import Block, KernelRun
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.stage import Stage
from raymerge.pipeline.errors import MemoryLimitError, TensorMismatchError
from raymerge.pipeline.plan.memory import count_scratch, measure_demand
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.sizes import format_memory

Figures = dict[str, Mapping[str, float]]
"""Figures that kernels have measured of each tensor, by its name."""


class ShardMerger:
    """Merges one task, window by window: `add` for each, in order."""

    def __init__(self, task: ShardTask, stage: Stage) -> None:
        """Take scratch for the most demanding tensor.

        Raises:
            MemoryLimitError: there is less memory on the GPU than the plan was allowed.
        """
        self.figures: list[Figures] = [{} for _ in task.outputs]
        self._task = task
        self._stage = stage
        with explain_full_gpu(task.file, task):
            self._scratch = stage.make_scratch(measure_scratch(task.merges, stage.piece_nbytes))
        self._tensor: _Tensor | None = None

    def add(self, filled: Filled) -> None:
        """Work off one window.

        Raises:
            MemoryLimitError: there is less memory on the GPU than the plan was allowed.
            TensorMismatchError: tensors that are copied differ between the inputs.
        """
        window, merge = filled.window, filled.window.merge
        if not merge.num_elements:
            return  # no bytes to write, and no block for a kernel to see
        if self._tensor is None or self._tensor.merge is not merge:
            self._tensor = _Tensor(merge)
        with explain_full_gpu(merge.name, self._task), self._stage.bring(filled) as sources:
            raws = [Raw(pieces, window.start, window.stop) for pieces in sources]
            for index in window.passes:
                self._run_pass(self._tensor, index, filled, raws)

    def _run_pass(self, tensor: _Tensor, index: int, filled: Filled, raws: Sequence[Raw]) -> None:
        is_last = filled.window.stop == tensor.merge.num_elements
        if index < tensor.num_passes:
            for block in self._cut(tensor, filled, raws):
                tensor.measure(index, block)
            if is_last:
                tensor.end_pass(index)
            return
        merge, dtype = tensor.merge, find_dtype(DTYPES[tensor.merge.written_dtype].torch_name)
        runs = tensor.combining_runs()
        for block in self._cut(tensor, filled, raws):
            for output, run in enumerate(runs):
                try:
                    run.combine(block, block.out)
                except SourceMismatchError as error:
                    raise _explain_difference(merge, error.source) from error
                self._stage.write(output, merge.name, block.out, dtype)
        if is_last:
            for figures, run in zip(self.figures, runs, strict=True):
                figures[merge.name] = run.figures()

    def _cut(self, tensor: _Tensor, filled: Filled, raws: Sequence[Raw]) -> Iterator[_WindowBlock]:
        """Yield the blocks of a window, or several at once where the stage wants that."""
        start, stop = filled.window.start, filled.window.stop
        step = tensor.demand.count_elements(self._stage.piece_nbytes)
        scratch = self._scratch.view(find_dtype(tensor.compute_dtype))
        for first in range(start, stop, step):
            yield _WindowBlock(tensor, raws, first, min(first + step, stop), scratch)


class _Tensor:
    """One output tensor while it is merged: the runs of its variants. Those that measure the same measure once."""

    def __init__(self, merge: TensorMerge) -> None:
        self.merge = merge
        sites = [(variant.kernel, merge.site(variant)) for variant in merge.variants]
        kernel, site = sites[0]
        self.demand = measure_demand(merge)
        self.compute_dtype = kernel.compute_dtype
        self.num_scratch = count_scratch(merge)
        self.num_passes = max(kernel.num_passes(site) for kernel, site in sites)
        self.decoders = [source.decoder for source in merge.sources]
        self.keeps_decoded = len(merge.variants) > 1
        groups: dict[Hashable, list[int]] = defaultdict(list)
        for position, (kernel, site) in enumerate(sites):
            groups[kernel.measuring(site), site.seed].append(position)
        self._groups = list(groups.values())
        self._leaders = [sites[group[0]][0].start(sites[group[0]][1]) for group in self._groups]
        self._pass_counts = [sites[group[0]][0].num_passes(sites[group[0]][1]) for group in self._groups]
        self._runs: list[KernelRun] = []

    def measure(self, index: int, block: Block) -> None:
        for leader, num_passes in zip(self._leaders, self._pass_counts, strict=True):
            if index < num_passes:
                leader.measure(index, block)

    def end_pass(self, index: int) -> None:
        for leader, num_passes in zip(self._leaders, self._pass_counts, strict=True):
            if index < num_passes:
                leader.end_pass(index)

    def combining_runs(self) -> Sequence[KernelRun]:
        """Return the run of each variant, after the last measuring pass."""
        if not self._runs:
            runs: dict[int, KernelRun] = {}
            for leader, (first, *others) in zip(self._leaders, self._groups, strict=True):
                runs[first] = leader
                runs |= {position: leader.share(self.merge.variants[position].kernel) for position in others}
            self._runs = [runs[position] for position in range(len(runs))]
        return self._runs


def measure_scratch(merges: Iterable[TensorMerge], piece_nbytes: int) -> int:
    """Return the scratch for pieces of so many bytes of the most demanding tensor; for one block if that is 0."""
    demands = [measure_demand(merge) for merge in merges]
    return max(d.of_window(d.scratch_nbytes, piece_nbytes) if piece_nbytes else d.scratch_nbytes for d in demands)


class _WindowBlock(Block):
    """One block of a window, or all of them, with its share of the task's scratch."""

    def __init__(self, tensor: _Tensor, raws: Sequence[Raw], start: int, stop: int, scratch: torch.Tensor) -> None:
        self.start = start
        self.stop = stop
        count = stop - start
        pieces = [scratch[k * count : (k + 1) * count] for k in range(tensor.num_scratch)]
        self.out = pieces[0]
        self.scratch = pieces[1:]
        self._raws = raws
        self._decoders = tensor.decoders
        self._decoded = pieces[-len(raws) :] if tensor.keeps_decoded else []
        self._is_decoded = [False] * len(raws)

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        """Decode one source's values into `out`; once for all variants."""
        if not self._decoded:
            return self._decode(source, out)
        if not self._is_decoded[source]:
            self._decode(source, self._decoded[source])
            self._is_decoded[source] = True
        return out.copy_(self._decoded[source])

    def _decode(self, source: int, out: torch.Tensor) -> torch.Tensor:
        return self._decoders[source].decode(self._raws[source], self.start, self.stop, out)


@contextmanager
def explain_full_gpu(name: str, task: ShardTask) -> Iterator[None]:
    """Explain a GPU that has less memory than the plan was allowed.

    Raises:
        MemoryLimitError: in place of torch's error.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(
            f"{name}: its GPU has less memory left than the {format_memory(task.projected_gpu_mem)} that the plan has"
            " for each worker; allow less with --gpu-memory, or end what else runs there"
        ) from error


def _explain_difference(merge: TensorMerge, source: int) -> TensorMismatchError:
    first, other = merge.sources[0], merge.sources[source]
    return TensorMismatchError(
        f"{merge.name} ({merge.out_dtype}, not floating-point) differs between {first.model} and {other.model};"
        " such tensors are not merged, only copied: to take those of the base, or else of the first model, add"
        " `integers: donor` to the config, or `max` or `sum` to combine them"
    )
