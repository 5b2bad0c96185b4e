"""Merges windows by torch: on GPUs, and what compiled loops do not know."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch

from raymerge.ops.decoders.decoder import Raw, find_dtype
from raymerge.ops.errors import OpParameterError, SourceMismatchError
from raymerge.ops.kernel import Block
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.engine.fetch import Filled
from raymerge.pipeline.engine.runs import Figures, TensorRuns
from raymerge.pipeline.engine.stage import Stage
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.memory.projection import count_scratch, measure_demand
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.sizes import format_memory


class TorchMerger:
    """Merges tensors of one task, window by window: `add` for each, in order, and `flush` at the end."""

    def __init__(self, task: ShardTask, stage: Stage, figures: Sequence[Figures]) -> None:
        """Take scratch for the most demanding tensor.

        Raises:
            MemoryLimitError: there is less memory on the GPU than the plan was allowed.
        """
        torch.set_num_threads(1)
        self._task = task
        self._figures = figures
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
            bounds = [(window.start, window.stop)] * merge.num_cut
            bounds += [(0, source.num_elements) for source in merge.sources[merge.num_cut :]]
            raws = [Raw(pieces, *bound) for pieces, bound in zip(sources, bounds, strict=True)]
            for index in window.passes:
                self._run_pass(self._tensor, index, filled, raws)

    def flush(self) -> None:
        """Append what is still on its way."""
        self._stage.flush()

    def _run_pass(self, tensor: _Tensor, index: int, filled: Filled, raws: Sequence[Raw]) -> None:
        is_last = filled.window.stop == tensor.merge.num_elements
        if index < tensor.num_early_passes:
            for decoder, raw in zip(tensor.decoders, raws, strict=True):
                if index < decoder.num_passes:
                    decoder.measure(index, raw, filled.window.start, filled.window.stop)
                    if is_last:
                        decoder.end_pass(index)
            return
        index -= tensor.num_early_passes
        if index < tensor.runs.num_passes:
            for block in self._cut(tensor, filled, raws):
                for position, run in tensor.runs.measuring_runs(index):
                    block.lend(tensor.spares[position])
                    run.measure(index, block)
            if is_last:
                tensor.runs.end_pass(index)
            return
        merge, dtype = tensor.merge, find_dtype(DTYPES[tensor.merge.written_dtype].torch_name)
        runs = tensor.runs.combining_runs()
        for block in self._cut(tensor, filled, raws):
            for output, run in enumerate(runs):
                block.lend(tensor.spares[output])
                try:
                    run.combine(block, block.out)
                except SourceMismatchError as error:
                    raise tensor.runs.explain_difference(error.source) from error
                except OpParameterError as error:
                    raise tensor.runs.explain_refusal(error) from error
                self._stage.write(output, merge.name, block.out, dtype)
        if is_last:
            tensor.runs.note_figures(self._figures)

    def _cut(self, tensor: _Tensor, filled: Filled, raws: Sequence[Raw]) -> Iterator[_WindowBlock]:
        """Yield the blocks of a window, or several at once where the stage wants that."""
        start, stop = filled.window.start, filled.window.stop
        step = tensor.demand.count_elements(self._stage.piece_nbytes)
        scratch = self._scratch.view(find_dtype(tensor.compute_dtype))
        for first in range(start, stop, step):
            yield _WindowBlock(tensor, raws, first, min(first + step, stop), scratch)


class _Tensor:
    """One output tensor while it is merged, and how it is cut."""

    def __init__(self, merge: TensorMerge) -> None:
        self.merge = merge
        self.runs = TensorRuns(merge)
        self.demand = measure_demand(merge)
        self.compute_dtype = merge.variants[0].kernel.compute_dtype
        self.num_scratch = count_scratch(merge)
        self.spares = [variant.kernel.num_scratch(merge.site(variant)) for variant in merge.variants]
        """Blocks of scratch of each variant's kernel."""
        self.decoders = [source.decoder.start() for source in merge.sources]
        self.num_early_passes = merge.num_early_passes
        self.num_decoded = merge.num_cut if len(merge.variants) > 1 else 0
        """Sources that are decoded once for all variants."""


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
        self._decoded = pieces[len(pieces) - tensor.num_decoded :]
        self._spares = pieces[1 : len(pieces) - tensor.num_decoded]
        self._raws = raws
        self._num_cut = tensor.merge.num_cut
        self._decoders = tensor.decoders
        self._is_decoded = [False] * len(raws)

    def lend(self, num_scratch: int) -> None:
        """Give the next kernel as much scratch as it has asked for."""
        self.scratch = self._spares[:num_scratch]

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        """Decode one source's values into `out`; once for all variants."""
        if not self._decoded or source >= self._num_cut:
            return self._decode(source, out)
        if not self._is_decoded[source]:
            self._decode(source, self._decoded[source])
            self._is_decoded[source] = True
        return out.copy_(self._decoded[source])

    def _decode(self, source: int, out: torch.Tensor) -> torch.Tensor:
        raw = self._raws[source]
        start, stop = (self.start, self.stop) if source < self._num_cut else (raw.start, raw.stop)
        return self._decoders[source].decode(raw, start, stop, out)


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
