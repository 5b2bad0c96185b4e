"""What a worker does: one output shard, block by block."""

from __future__ import annotations

import os
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from functools import cache
from pathlib import Path

import torch

from raymerge.cluster.host import find_host
from raymerge.cluster.runner import Progress, Report
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.registry import find_op
from raymerge.pipeline.dtypes import DTYPES
from raymerge.pipeline.errors import CorruptedError, TensorMismatchError
from raymerge.pipeline.fetch import Filled, fetch_windows
from raymerge.pipeline.journal import Journal
from raymerge.pipeline.memory import measure_demand
from raymerge.pipeline.shard_writer import ShardWriter
from raymerge.pipeline.storage import StorageSettings, configure_storages, storage_for
from raymerge.pipeline.stores.retry import FAULTS, one_line
from raymerge.pipeline.tensor_merge import COPY
from raymerge.pipeline.types import ShardResult, ShardTask, StoredFile, TensorMerge
from raymerge.pipeline.windows import make_fetches

COMPUTE_DTYPE = torch.float32

_STATUS = Path("/proc/self/status")
"""Where Linux says what memory this process has."""

_MAX_ATTEMPTS = 6
"""At a shard that a store keeps corrupting."""


def run_shard(task: ShardTask, report: Report, *, journal: Journal, settings: StorageSettings) -> ShardResult:
    """Make one output file and enter it in the journal; once more where a store has something else than it was sent.

    Args:
        task: what to make.
        report: called often; raises if the run is to end.
        journal: of the output.
        settings: of the storages.

    Raises:
        FetchError: an input could not be read, or has changed.
        OutputError: the output could not be written.
        TensorMismatchError: tensors that are not floating-point differ between the inputs.
    """
    configure_storages(settings)
    torch.set_num_threads(1)
    first_mem = _measure_first_mem(os.getpid())
    start = time.perf_counter()
    for attempt in range(1, _MAX_ATTEMPTS + 1):
        done = Progress(0, 0)

        def count(progress: Progress) -> None:
            nonlocal done
            done = Progress(done.read_nbytes + progress.read_nbytes, done.written_nbytes + progress.written_nbytes)
            report(progress)

        try:
            file, sha256, nonfinite = _make_shard(task, count, journal)
            break
        except CorruptedError as error:
            if attempt == _MAX_ATTEMPTS:
                raise
            FAULTS.note(journal.out, "write", one_line(error))
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
        peak_measured_mem=max(0, peak_rss() - _measure_code() - first_mem),
        host=find_host(),
        faults=FAULTS.drain(),
    )
    journal.record(result)
    return result


def _make_shard(task: ShardTask, report: Report, journal: Journal) -> tuple[StoredFile, str, tuple[str, ...]]:
    """Return the file as it is stored, its sha256, and the tensors with NaN or infinity."""
    writer = journal.open_shard(task)
    shard = ShardWriter(writer)
    try:
        shard.append_bytes(task.header)
        report(Progress(written_nbytes=len(task.header)))
        merger = _ShardMerger(task, shard)
        with closing(fetch_windows(make_fetches(task), task.buffer_nbytes, task.num_buffers)) as windows:
            for filled in windows:
                before = shard.nbytes
                merger.add(filled)
                report(Progress(sum(len(view) for view in filled.views), shard.nbytes - before))
        sha256 = shard.finish()
        for file in dict.fromkeys(source.file for merge in task.merges for source in merge.sources):
            storage_for(file.url).check_unchanged(file)
        journal.check_held()
    except BaseException:
        shard.abort()
        raise
    return writer.commit(), sha256, tuple(merger.nonfinite)


def peak_rss() -> int:
    """Return the largest resident set of this process so far, in bytes."""
    if _STATUS.exists():  # getrusage also counts what the process was before it was this program
        return _read_status("VmHWM")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@cache
def _measure_first_mem(process: int) -> int:
    """Return what a process, this one, had in memory besides code when it was first asked, in bytes."""
    return _read_status("RssAnon") if _STATUS.exists() else peak_rss()


def _measure_code() -> int:
    """Return how much of this process's memory is code, which is loaded when it is used first, in bytes."""
    return _read_status("RssFile") if _STATUS.exists() else 0


def _read_status(key: str) -> int:
    lines = _STATUS.read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) * 1024


class _ShardMerger:
    """Turns windows into output, in the order in which they come."""

    def __init__(self, task: ShardTask, shard: ShardWriter) -> None:
        self.task = task
        self.shard = shard
        self.nonfinite: list[str] = []
        demands = [measure_demand(merge) for merge in task.merges]
        self._scratch = torch.empty(
            max(d.scratch_nbytes for d in demands) // COMPUTE_DTYPE.itemsize, dtype=COMPUTE_DTYPE
        )
        self._merge: TensorMerge | None = None
        self._kernel: Kernel
        self._run: KernelRun
        self._sum = 0.0

    def add(self, filled: Filled) -> None:
        """Work off one window."""
        merge = filled.window.merge
        if not merge.num_elements:
            return  # no bytes to write, and no block for a kernel to see
        if merge.op == COPY:
            self._copy(merge, filled.views)
            return
        if merge is not self._merge:
            self._begin(merge)
        sources = [
            torch.frombuffer(view, dtype=getattr(torch, DTYPES[source.dtype].torch_name)) if view else torch.empty(0)
            for source, view in zip(merge.sources, filled.views, strict=True)
        ]
        for index in filled.window.passes:
            if index == self._kernel.num_passes:
                self._combine(merge, filled, sources)
            else:
                for block in self._blocks(filled, sources):
                    self._run.measure(index, block)
                if filled.window.stop == merge.num_elements:
                    self._run.end_pass(index)

    def _begin(self, merge: TensorMerge) -> None:
        self._merge = merge
        self._sum = 0.0
        self._kernel = find_op(merge.op).kernel(dict(merge.parameters))
        self._run = self._kernel.start(Site(merge.name, merge.num_elements, len(merge.sources), self.task.seed))

    def _combine(self, merge: TensorMerge, filled: Filled, sources: Sequence[torch.Tensor]) -> None:
        dtype: torch.dtype = getattr(torch, DTYPES[merge.out_dtype].torch_name)
        for block in self._blocks(filled, sources):
            out = block.out
            self._run.combine(block, out)
            self.shard.append(out, dtype)
            # A sum is finite only if all values are; float16 may overflow where float32 does not.
            self._sum += float((out.to(dtype) if dtype is torch.float16 else out).sum(dtype=torch.float32))
        if filled.window.stop == merge.num_elements and not abs(self._sum) < float("inf"):
            self.nonfinite.append(merge.name)

    def _blocks(self, filled: Filled, sources: Sequence[torch.Tensor]) -> Sequence[_WindowBlock]:
        size = self._kernel.block_elements
        window = filled.window
        num_scratch = self._kernel.num_scratch(len(sources))
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
        self.shard.append_bytes(views[0])


class _WindowBlock(Block):
    """One block of a window, with its share of the task's scratch."""

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
