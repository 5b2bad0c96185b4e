"""The work of one task: the same shard of every output, block by block."""

from __future__ import annotations

import gc
import math
import os
import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from raymerge import RaymergeError
from raymerge.cluster.host import find_host
from raymerge.cluster.runner import Progress, Report
from raymerge.ops.errors import OpFileError, find_line
from raymerge.ops.kernels.sparsifiers.counts import forget_tables
from raymerge.pipeline.engine.digests import can_share, make_digests
from raymerge.pipeline.engine.fetch import Filled, fetch_windows
from raymerge.pipeline.engine.gpu.devices import take_gpu
from raymerge.pipeline.engine.merger import HostMerger
from raymerge.pipeline.engine.padding import fill_padding
from raymerge.pipeline.engine.process_memory import measure_first_mem, measure_peak, peak_rss
from raymerge.pipeline.engine.readiness import prepare
from raymerge.pipeline.engine.runs import Figures
from raymerge.pipeline.engine.tally import Tally
from raymerge.pipeline.engine.threads import open_threads
from raymerge.pipeline.engine.writer import ShardWriter
from raymerge.pipeline.errors import CorruptedError
from raymerge.pipeline.output.journal import Journal
from raymerge.pipeline.plan.memory.windows import make_fetches
from raymerge.pipeline.plan.results import ShardFile, ShardResult
from raymerge.pipeline.plan.types import ShardTask
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.retry import one_line

if TYPE_CHECKING:
    from raymerge.pipeline.engine.torch_merger import TorchMerger

_REPORT_SECONDS = 0.05
"""Between reports of what was merged."""

_NUM_CHECKS = 16
"""Input files that are looked at at once before a shard is committed: a merge of many models has hundreds."""


def run_shard(
    stores: Stores, task: ShardTask, report: Report, *, journals: Sequence[Journal], device: str = "cuda"
) -> ShardResult:
    """Make one file of every output and enter it in the journals; once more where a store has other bytes than sent.

    Args:
        stores: of inputs and outputs.
        task: what to make.
        report: called often; raises if the run is to end.
        journals: of the plan's outputs; the task writes to some of them, or to all.
        device: where tasks that are planned for a GPU are merged: on any other one, for tests, the same way.

    Raises:
        ConfigError: there is no GPU.
        MemoryLimitError: the GPU has less memory than the plan was allowed.
        FetchError: an input could not be read, or has changed.
        OutputError: an output could not be written.
        TensorMismatchError: tensors that are not floating-point differ between the inputs.
    """
    journals = [journals[position] for position in task.positions]
    remark = ""
    if len(task.outputs) > 1:
        can_share()  # before the first measure: what is imported and compiled is not the shard's
    if not task.piece_nbytes:
        remark = prepare(task.merges)  # nor what this takes
    elif device == "cuda":
        take_gpu()  # nor is what CUDA takes of the host
    _connect(stores, task, journals)  # nor are clients of stores and their modules
    first_mem, first_peak = measure_first_mem(os.getpid())
    start = time.perf_counter()
    failures: Counter[type[Exception]] = Counter()
    while True:
        done = Progress(0, 0)

        def count(progress: Progress) -> None:
            nonlocal done
            done = Progress(done.read_nbytes + progress.read_nbytes, done.written_nbytes + progress.written_nbytes)
            report(progress)

        try:
            with _explain_own(task):
                files = _make_shard(stores, task, count, journals, device)
            break
        except CorruptedError as error:
            failures[type(error)] += 1
            if failures[type(error)] >= error.num_attempts:
                raise
            stores.faults.note(journals[0].out, "write", one_line(error))
            report(Progress(0, -done.written_nbytes))
        gc.collect()  # the error and the frames that it came through hold on to buffers and to each other
    for journal, file in zip(journals, files, strict=True):
        journal.record(file)
    return ShardResult(
        file=task.file,
        nbytes=task.nbytes,
        files=files,
        read_nbytes=done.read_nbytes,
        seconds=time.perf_counter() - start,
        peak_rss=peak_rss(),
        peak_measured_mem=measure_peak(first_mem, first_peak),
        host=find_host(),
        faults=stores.faults.drain(),
        remark=remark,
    )


@contextmanager
def _explain_own(task: ShardTask) -> Iterator[None]:
    """Explain what a method of the user's own raises.

    Raises:
        OpFileError: with the line of its file.
    """
    try:
        yield
    except Exception as error:
        path = task.own.path if task.own else ""
        line = find_line(error, path)
        if isinstance(error, RaymergeError) or not line:
            raise
        raise OpFileError(
            f"{path}{line}: {task.merges[0].op}, in {task.file}: {type(error).__name__}: {error}"
        ) from error


def _make_shard(
    stores: Stores, task: ShardTask, report: Report, journals: Sequence[Journal], device: str
) -> tuple[ShardFile, ...]:
    """Return the files as they are stored."""
    shards: list[ShardWriter] = []
    tallies = [Tally() for _ in task.outputs]
    measured: list[Figures] = [{} for _ in task.outputs]
    try:
        digests = make_digests(len(task.outputs))
        for journal, output, digest in zip(journals, task.outputs, digests, strict=True):
            shards.append(ShardWriter(journal.open_shard(output), stores.pool, digest))
            shards[-1].append_bytes(output.header)
        report(Progress(written_nbytes=sum(shard.nbytes for shard in shards)))
        with ExitStack() as stack:
            stack.callback(forget_tables)  # that the plan of the next task does not know of

            def count(nbytes: int) -> None:
                report(Progress(nbytes))

            task = fill_padding(stores, task, count)
            merger: HostMerger | TorchMerger
            windows: Generator[Filled, None, None]
            if task.piece_nbytes:
                from raymerge.pipeline.engine.gpu.merger import open_gpu_merger

                opened = open_gpu_merger(task, shards, tallies, measured, device)
                stage, merger = stack.enter_context(opened)
                windows = stage.fetch(stores, make_fetches(task), count)
            else:
                lent = stores.pool.lend(task.buffer_nbytes, task.num_buffers, keep=task.keeps_buffers)
                buffers = stack.enter_context(lent)
                run_all = stack.enter_context(open_threads(task.num_threads))  # ends before they are given back
                make_torch_merger = partial(_make_torch_merger, task, shards, tallies, measured)
                merger = HostMerger(shards, tallies, measured, run_all, make_torch_merger)
                windows = fetch_windows(stores, make_fetches(task), buffers, count, run_all)
            told, time_told = sum(shard.nbytes for shard in shards), time.monotonic()
            for filled in stack.enter_context(closing(windows)):
                merger.add(filled)
                if time.monotonic() - time_told > _REPORT_SECONDS:  # small tensors take less than a report does
                    appended = sum(shard.nbytes for shard in shards)
                    report(Progress(written_nbytes=appended - told))
                    told, time_told = appended, time.monotonic()
            merger.flush()
            report(Progress(0, sum(shard.nbytes for shard in shards) - told))
        for shard in shards:
            shard.close()
        sha256s = [shard.finish() for shard in shards]
        with ThreadPoolExecutor(_NUM_CHECKS, thread_name_prefix="check") as pool:
            list(pool.map(lambda file: stores.at(file.url).check_unchanged(file), _list_inputs(task)))
        for journal in journals:
            journal.check_held()
    except BaseException:
        for shard in shards:
            shard.abort()
        raise
    files = []
    for position, (shard, output) in enumerate(zip(shards, task.outputs, strict=True)):
        try:
            stored = shard.commit()
        except BaseException:
            for other in shards[position + 1 :]:
                other.abort()
            raise
        tally, kernels = tallies[position], measured[position]
        figures = {name: _keep_finite({**norm, **kernels[name]}) for name, norm in tally.figures().items()}
        files.append(ShardFile(output.file, output.nbytes, sha256s[position], stored.etag, tally.nonfinite, figures))
    return tuple(files)


def _connect(stores: Stores, task: ShardTask, journals: Sequence[Journal]) -> None:
    for url in (*(file.url for file in _list_inputs(task)), *(journal.out for journal in journals)):
        stores.at(url).connect(url)


def _list_inputs(task: ShardTask) -> Iterable[StoredFile]:
    sources = (tensor for merge in task.merges for source in merge.sources for tensor in source.origins)
    return dict.fromkeys(tensor.file for tensor in sources)


def _keep_finite(figures: Mapping[str, float]) -> dict[str, float]:
    """Leave out NaN and infinity, which no JSON has: the tensor is listed as not finite."""
    return {name: value for name, value in figures.items() if math.isfinite(value)}


def _make_torch_merger(
    task: ShardTask, shards: Sequence[ShardWriter], tallies: Sequence[Tally], figures: Sequence[Figures]
) -> TorchMerger:
    from raymerge.pipeline.engine.host_stage import HostStage
    from raymerge.pipeline.engine.torch_merger import TorchMerger

    return TorchMerger(task, HostStage(shards, tallies), figures)
