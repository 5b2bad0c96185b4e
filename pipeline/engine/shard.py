"""What a worker does: one output shard, block by block."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from functools import cache
from pathlib import Path

import torch

from raymerge.cluster.host import find_host
from raymerge.cluster.runner import Progress, Report
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.engine.fetch import Filled, fetch_windows
from raymerge.pipeline.engine.gpu_stage import open_gpu_stage
from raymerge.pipeline.engine.gpus import take_gpu
from raymerge.pipeline.engine.host_stage import HostStage, Stage
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.errors import CorruptedError, MemoryLimitError, TensorMismatchError
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.plan.memory import measure_demand, out_slot_nbytes
from raymerge.pipeline.plan.resolve import COPY
from raymerge.pipeline.plan.types import ShardResult, ShardTask, TensorMerge
from raymerge.pipeline.plan.windows import make_fetches
from raymerge.pipeline.sizes import format_memory
from raymerge.pipeline.stores.files import Buffer, StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.retry import one_line

COMPUTE_DTYPE = torch.float32

_STATUS = Path("/proc/self/status")
"""Where Linux says what memory this process has."""

_MAX_ATTEMPTS = 6
"""At a shard that a store keeps corrupting."""


def run_shard(
    stores: Stores, task: ShardTask, report: Report, *, journal: Journal, device: str = "cuda"
) -> ShardResult:
    """Make one output file and enter it in the journal; once more where a store has something else than it was sent.

    Args:
        stores: of inputs and output.
        task: what to make.
        report: called often; raises if the run is to end.
        journal: of the output.
        device: where tasks that are planned for a GPU are merged: on any other one, for tests, the same way.

    Raises:
        ConfigError: there is no GPU.
        MemoryLimitError: the GPU has less memory than the plan was allowed.
        FetchError: an input could not be read, or has changed.
        OutputError: the output could not be written.
        TensorMismatchError: tensors that are not floating-point differ between the inputs.
    """
    torch.set_num_threads(1)
    if task.projected_gpu_mem and device == "cuda":
        take_gpu()  # before the first measure: what CUDA takes of the host is not the shard's
    first_mem, first_peak = _measure_first_mem(os.getpid())
    start = time.perf_counter()
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        done = Progress(0, 0)

        def count(progress: Progress) -> None:
            nonlocal done
            done = Progress(done.read_nbytes + progress.read_nbytes, done.written_nbytes + progress.written_nbytes)
            report(progress)

        try:
            file, sha256, nonfinite = _make_shard(stores, task, count, journal, device)
            break
        except CorruptedError as error:
            if attempt == _MAX_ATTEMPTS:
                raise
            stores.faults.note(journal.out, "write", one_line(error))
            report(Progress(0, -done.written_nbytes))
    result = ShardResult(
        file=task.file,
        nbytes=task.nbytes,
        sha256=sha256,
        etag=file.etag,
        nonfinite=nonfinite,
        read_nbytes=done.read_nbytes,
        seconds=time.perf_counter() - start,
        peak_rss=peak_rss(),
        peak_measured_mem=_measure_peak(first_mem, first_peak),
        host=find_host(),
        faults=stores.faults.drain(),
    )
    journal.record(result)
    return result


def _make_shard(
    stores: Stores, task: ShardTask, report: Report, journal: Journal, device: str
) -> tuple[StoredFile, str, tuple[str, ...]]:
    """Return the file as it is stored, its sha256, and the tensors with NaN or infinity."""
    writer = journal.open_shard(task)
    shard = ShardWriter(writer, stores.pool)
    try:
        shard.append_bytes(task.header)
        report(Progress(written_nbytes=len(task.header)))
        with ExitStack() as stack:
            buffers = stack.enter_context(stores.pool.lend(task.buffer_nbytes, task.num_buffers))
            with _explain_full_gpu(task.file, task):
                stage = _open_stage(stores, task, shard, buffers, device, stack)
                merger = _ShardMerger(task, shard, stage)
            for filled in stack.enter_context(closing(fetch_windows(stores, make_fetches(task), buffers))):
                before = shard.nbytes
                merger.add(filled)
                report(Progress(sum(len(view) for view in filled.views), shard.nbytes - before))
            before = shard.nbytes
            stage.flush()
            report(Progress(0, shard.nbytes - before))
        sha256 = shard.finish()
        for file in dict.fromkeys(source.file for merge in task.merges for source in merge.sources):
            stores.at(file.url).check_unchanged(file)
        journal.check_held()
    except BaseException:
        shard.abort()
        raise
    return writer.commit(), sha256, stage.nonfinite


def _open_stage(
    stores: Stores, task: ShardTask, shard: ShardWriter, buffers: list[Buffer], device: str, stack: ExitStack
) -> Stage:
    if not task.projected_gpu_mem:
        return HostStage(shard)
    there = take_gpu() if device == "cuda" else torch.device(device)
    out_nbytes = max(out_slot_nbytes(measure_demand(merge), task.buffer_nbytes) for merge in task.merges)
    return stack.enter_context(open_gpu_stage(shard, stores.pool, there, buffers, out_nbytes))


def peak_rss() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if _STATUS.exists():  # getrusage also counts what the process was before it was this program
        return _read_status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _measure_first_mem(process: int) -> tuple[int, int]:
    """Return what a process, this one, had in memory besides code when it was first asked, and its peak, in bytes."""
    return (_read_status("RssAnon") if _STATUS.exists() else peak_rss()), peak_rss()


def _measure_peak(first_mem: int, first_peak: int) -> int:
    """Return how much more memory than at first there was, in bytes: at the peak, or now where that was before."""
    if peak_rss() > first_peak or not _STATUS.exists():
        return max(0, peak_rss() - _measure_code() - first_mem)
    return max(0, _read_status("RssAnon") - first_mem)


def _measure_code() -> int:
    """Return how much of this process's memory is code, which is loaded when it is used first, in bytes."""
    return _read_status("RssFile") if _STATUS.exists() else 0


def _read_status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


class _ShardMerger:
    """Turns windows into output, in the order in which they come."""

    def __init__(self, task: ShardTask, shard: ShardWriter, stage: Stage) -> None:
        self.task = task
        self.shard = shard
        self.stage = stage
        demands = [measure_demand(merge) for merge in task.merges]
        nbytes = max(
            d.of_window(d.scratch_nbytes, task.buffer_nbytes) if stage.takes_windows else d.scratch_nbytes
            for d in demands
        )
        self._scratch = torch.empty(nbytes // COMPUTE_DTYPE.itemsize, dtype=COMPUTE_DTYPE, device=stage.device)
        self._merge: TensorMerge | None = None
        self._kernel: Kernel
        self._site: Site
        self._run: KernelRun

    def add(self, filled: Filled) -> None:
        """Work off one window.

        Raises:
            MemoryLimitError: there is less memory on the GPU than the plan was allowed.
        """
        merge = filled.window.merge
        if not merge.num_elements:
            return  # no bytes to write, and no block for a kernel to see
        if merge.op == COPY:
            self._copy(merge, filled.views)
            return
        if merge is not self._merge:
            self._begin(merge)
        dtypes = [_torch_dtype(source.dtype) for source in merge.sources]
        with _explain_full_gpu(merge.name, self.task), self.stage.bring(filled.views, dtypes) as sources:
            self._merge_window(merge, filled, sources)

    def _merge_window(self, merge: TensorMerge, filled: Filled, sources: Sequence[torch.Tensor]) -> None:
        num_passes = self._kernel.num_passes(self._site)
        for index in filled.window.passes:
            if index == num_passes:
                for block in self._blocks(filled, sources):
                    self._run.combine(block, block.out)
                    self.stage.write(merge.name, block.out, _torch_dtype(merge.out_dtype))
            else:
                for block in self._blocks(filled, sources):
                    self._run.measure(index, block)
                if filled.window.stop == merge.num_elements:
                    self._run.end_pass(index)

    def _begin(self, merge: TensorMerge) -> None:
        self._merge = merge
        self._kernel = find_op(merge.op).kernel(dict(merge.parameters))
        self._site = Site(merge.name, merge.shape, len(merge.sources), self.task.seed)
        self._run = self._kernel.start(self._site)

    def _blocks(self, filled: Filled, sources: Sequence[torch.Tensor]) -> Sequence[_WindowBlock]:
        window = filled.window
        size = window.stop - window.start if self.stage.takes_windows else self._kernel.grid(self._site)
        num_scratch = self._kernel.num_scratch(self._site)
        return [
            _WindowBlock(start, min(start + size, window.stop), window.start, sources, self._scratch, num_scratch)
            for start in range(window.start, window.stop, size)
        ]

    def _copy(self, merge: TensorMerge, views: Sequence[memoryview]) -> None:
        for source, view in zip(merge.sources[1:], views[1:], strict=True):
            if view != views[0]:
                raise TensorMismatchError(
                    f"{merge.name} ({source.dtype}, not floating-point) differs between {merge.sources[0].model} and "
                    f"{source.model}; such tensors cannot be merged, only copied from equal inputs"
                )
        self.stage.flush()
        self.shard.append_bytes(views[0])


@contextmanager
def _explain_full_gpu(name: str, task: ShardTask) -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise MemoryLimitError(
            f"{name}: its GPU has less memory left than the {format_memory(task.projected_gpu_mem)} that the plan has"
            " for each worker; allow less with --gpu-memory, or end what else runs there"
        ) from error


def _torch_dtype(name: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, DTYPES[name].torch_name)
    return dtype


class _WindowBlock(Block):
    """One block of a window, or all of them, with its share of the task's scratch."""

    def __init__(
        self,
        start: int,
        stop: int,
        window_start: int,
        sources: Sequence[torch.Tensor],
        scratch: torch.Tensor,
        num_scratch: int,
    ) -> None:
        self.start = start
        self.stop = stop
        num_elements = stop - start
        pieces = [scratch[k * num_elements : (k + 1) * num_elements] for k in range(num_scratch + 1)]
        self.out = pieces[0]
        self.scratch = pieces[1:]
        self._sources = sources
        self._offset = start - window_start

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        """Convert one source's values into `out`."""
        return out.copy_(self._sources[source][self._offset : self._offset + self.stop - self.start])
