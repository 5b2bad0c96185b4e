"""Projected memory of a task, added up before anything runs.

What is counted besides tensors was measured, as anonymous memory that a worker has more than before its first shard:

- `WORKER_NBYTES` in every worker: stacks and arenas of its threads; `TENSOR_NBYTES` for each tensor of its task;
- `Storage.read_nbytes`, `write_nbytes` and `library_nbytes` for each storage in use: bodies in flight, parts of
  uploads, threads and connections of its library;
- `cluster.ray.session.TASK_NBYTES` on Ray: its threads, and what it keeps of a task that runs.

Interpreter, imported code and clients of stores are there before the first shard, and are no part of `--memory`. Nor is
the plan itself, which the process that plans keeps besides; one that would take more than `--memory` is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace

from raymerge.ops.kernels.sparsifiers.counts import KEPT_NBYTES
from raymerge.ops.stored import PIECE_ELEMENTS, STRIP
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.sizes import format_memory
from raymerge.pipeline.stores.files import ALIGNMENT
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES

_ITEM_NBYTES = {dtype.torch_name: dtype.num_bits // 8 for dtype in DTYPES.values()}
"""Bytes of an element, by torch's word for the dtype."""

MAX_FETCH_NBYTES = 64 * 2**20
"""Fetched at once, unless a block, or a tensor that is kept between its passes, takes more."""

LOCAL_FETCH_NBYTES = 8 * 2**20
"""Fetched at once from local files: little enough to be in a core's cache still when it is merged."""

_FIXED_SHARE = 8
"""A fetch is so many times as large as what it takes whatever its size."""

WORKER_NBYTES = 4 * 2**20
"""Taken in every worker for stacks and allocator arenas of its threads. Measured on 2 cores: 1 to 4 MiB."""

_STORED_NBYTES, _OUTPUT_NBYTES = 650, 1900
"""Taken by the process that plans for each tensor of an input, and for each of the output. Measured with 300,000
tensors of one and two inputs, and with 300 tensors of 20 and 40."""

SEGMENT_ELEMENTS = 2**18
"""Elements of every source that are put together at once, where one is gathered from rows."""

_PADDING_NBYTES = 4 * 2**20
"""Taken to read all rows once more for the mean that padding is. Measured with 31,000 scattered rows of three models:
3 MiB."""

TENSOR_NBYTES = 550
"""Taken in a worker for what it tells of each tensor of its task, for each output. Measured with 20,000 in one task."""

_SQUARES_NBYTES = 4 * STRIP * (2 + OUTPUT_BUFFER_NBYTES // (2 * PIECE_ELEMENTS))
"""Sums of squares of what is written, for each output after the first, which is part of `WORKER_NBYTES`: a strip for
each piece of a buffer, and two more."""

NOTABLE_NBYTES = 32 * 2**20
"""Memory of a plan by itself that is worth a word."""


def project_plan_mem(num_stored: int, num_outputs: int) -> int:
    """Return the memory that planning takes, in bytes, for tensors of all inputs and of the output.

    >>> project_plan_mem(1_000_000, 500_000)
    1600000000
    """
    return _STORED_NBYTES * num_stored + _OUTPUT_NBYTES * num_outputs


def check_plan_fits(where: str, num_stored: int, num_outputs: int, allowed_mem: int) -> None:
    """Refuse a plan that takes more memory by itself than the merge may.

    Raises:
        MemoryLimitError: naming both figures and the limit to give.
    """
    needed = project_plan_mem(num_stored, num_outputs)
    if needed > max(allowed_mem, NOTABLE_NBYTES):
        raise MemoryLimitError(
            f"{where}: {num_stored:,} tensors, whose plan takes {format_memory(needed)}, and"
            f" {format_memory(allowed_mem)} are allowed; give --memory {format_memory(needed)} or more"
        )


@dataclass(frozen=True, slots=True)
class Demand:
    """The least memory that one output tensor needs."""

    block_elements: int
    """Elements of a block of its grid."""
    num_blocks: int
    """Blocks of its grid in the whole tensor."""
    num_passes: int
    """Measuring passes before it is combined."""
    block_nbytes: int
    """One block of every source, as stored, and decoded where loops need that."""
    scratch_nbytes: int
    """Blocks in the compute dtype, the result among them."""
    state_nbytes: int
    """State that the kernels keep besides."""
    out_nbytes: int
    """One block of the output, as stored."""
    kept_nbytes: int
    """All of every source, as stored, where it is needed more than once; else 0."""
    fixed_nbytes: int = 0
    """Room that sources take in a buffer besides, however few of their blocks are in it."""

    @property
    def least_nbytes(self) -> int:
        """The smallest buffer that is enough."""
        return self.block_nbytes + self.fixed_nbytes

    def choose_fetch_nbytes(self, fetch_nbytes: int) -> int:
        """Return how much is fetched at once, so that what each fetch takes besides blocks is a small part of it."""
        return max(fetch_nbytes, min(MAX_FETCH_NBYTES, _FIXED_SHARE * self.fixed_nbytes), self.least_nbytes)

    @property
    def working_nbytes(self) -> int:
        """Memory besides input and output buffers."""
        return self.scratch_nbytes + self.state_nbytes

    def count_elements(self, nbytes: int) -> int:
        """Return the elements of the whole blocks that have room in so many bytes; of one block at least."""
        return max(1, nbytes // max(1, self.block_nbytes)) * self.block_elements

    def of_window(self, nbytes: int, buffer_nbytes: int) -> int:
        """Scale a per-block size to a whole window; a buffer holds one block at least."""
        if self.num_blocks <= 1:
            return nbytes * self.num_blocks
        return -(-nbytes * min(self.num_blocks * self.block_nbytes, buffer_nbytes) // self.block_nbytes)


def measure_demand(merge: TensorMerge) -> Demand:
    """Return the demand of a tensor."""
    sites = [(variant.kernel, merge.site(variant)) for variant in merge.variants]
    kernel, site = sites[0]
    grid = max(1, merge.num_elements if merge.has_whole_statistics else kernel.grid(site))
    num_elements = min(grid, merge.num_elements)
    states = {kernel.measuring(site): kernel.state_nbytes(site) for kernel, site in sites}
    num_passes = merge.num_passes
    return Demand(
        block_elements=grid,
        num_blocks=-(-merge.num_elements // grid),
        num_passes=num_passes,
        block_nbytes=sum(s.room_nbytes(num_elements) - s.fixed_nbytes for s in merge.sources[: merge.num_cut])
        + sum(source.max_nbytes(source.num_elements) for source in merge.sources[merge.num_cut :]),
        fixed_nbytes=sum(source.fixed_nbytes for source in merge.sources[: merge.num_cut]),
        scratch_nbytes=num_elements * _ITEM_NBYTES[kernel.compute_dtype] * count_scratch(merge)
        + max(
            source.decoder.temporary_nbytes(num_elements if k < merge.num_cut else source.num_elements)
            for k, source in enumerate(merge.sources)
        )
        + _measure_gathered(merge, grid),
        state_nbytes=sum(states.values()) + sum(source.decoder.state_nbytes(num_elements) for source in merge.sources),
        out_nbytes=num_elements * DTYPES[merge.written_dtype].num_bits // 8,
        kept_nbytes=measure_kept(merge) if num_passes or _is_scattered(merge) else 0,
    )


def forgo_keeping(merge: TensorMerge, demand: Demand) -> Demand:
    """Return the demand where the page cache keeps the sources: of large ones, merges on the way are made again.

    Keeping them takes fresh memory for the values on the way, too, and fresh memory costs more than the page cache.
    """
    is_large = demand.kept_nbytes > MAX_FETCH_NBYTES and demand.num_blocks > 1
    is_nested = any(isinstance(source, MergedTensor) for source in merge.sources)
    return replace(demand, kept_nbytes=0) if is_large and is_nested and not _is_scattered(merge) else demand


def read_by_row(merge: TensorMerge) -> TensorMerge:
    """Return a tensor with sources whose rows come from all over read by row, where the page cache keeps them.

    A call for each row costs less than the fresh memory that the whole source takes.
    """
    sources = tuple(
        replace(source, is_by_row=True)
        if isinstance(source, GatheredRows) and source.is_scattered and source.can_be_by_row
        else source
        for source in merge.sources[: merge.num_cut]
    )
    return replace(merge, sources=(*sources, *merge.sources[merge.num_cut :]))


def _is_scattered(merge: TensorMerge) -> bool:
    """Return whether a source is better read as a whole, even if once."""
    gathered = (source for source in merge.sources if isinstance(source, GatheredRows))
    return any(source.is_scattered and not source.is_by_row for source in gathered)


def _measure_gathered(merge: TensorMerge, grid: int) -> int:
    """Return the memory for pieces of all sources that are put together, where one is gathered from rows."""
    gathered = [source for source in merge.sources if isinstance(source, GatheredRows)]
    if not gathered:
        return 0
    num_elements = min(merge.num_elements, max(grid, SEGMENT_ELEMENTS)) + 2 * gathered[0].columns
    padding = _PADDING_NBYTES if any(source.rows.num_pad for source in gathered) else 0
    return (4 * num_elements + 2 * ALIGNMENT) * len(merge.sources) + padding


def measure_kept(merge: TensorMerge) -> int:
    """Return the room that all of a tensor's sources take in a buffer."""
    return sum(source.room_nbytes(source.num_elements) for source in merge.sources)


def count_scratch(merge: TensorMerge) -> int:
    """Return the blocks in the compute dtype that a worker has for a tensor.

    The result, the kernels' scratch and, where several variants are made of them, the decoded sources.
    """
    decoded = merge.num_cut if len(merge.variants) > 1 else 0
    return 1 + max(variant.kernel.num_scratch(merge.site(variant)) for variant in merge.variants) + decoded


@dataclass(frozen=True, slots=True)
class Transfer:
    """Memory for reading and writing, in each worker."""

    num_buffers: int = 1
    """Input buffers."""
    nbytes: int = 0
    """Memory that storages and runner take besides, for all outputs together."""
    num_outputs: int = 1
    """Files that are written at once."""
    fetch_nbytes: int = MAX_FETCH_NBYTES
    """Bytes fetched at once."""
    staging_nbytes: int = 8 * 2**20
    """Size of a buffer that inputs go through on their way to a GPU: for a local disk, which needs no more."""


def choose_buffer_nbytes(demands: Collection[Demand], worker_mem: int, transfer: Transfer) -> int:
    """Return the size of one input buffer for tensors with these demands.

    Args:
        demands: of all tensors.
        worker_mem: what one worker may use, in bytes.
        transfer: of each worker.

    Returns:
        As much as is useful and fits: as many tensors as possible are kept between their passes. Less than
        `largest_block` where the memory does not suffice.
    """
    useful = max(demand.choose_fetch_nbytes(transfer.fetch_nbytes) for demand in demands)
    room = (worker_mem - project_mem(demands, 0, transfer)) // transfer.num_buffers // ALIGNMENT * ALIGNMENT
    kept = max((demand.kept_nbytes for demand in demands if demand.kept_nbytes <= room), default=0)
    return min(max(useful, kept), room)


def project_mem(demands: Collection[Demand], buffer_nbytes: int, transfer: Transfer) -> int:
    """Return the peak memory of a task for tensors, scratch, transfers and threads, in bytes."""
    states = {demand.state_nbytes for demand in demands}
    working = max(demand.working_nbytes + _count_kept(states, demand.state_nbytes) for demand in demands)
    return transfer.num_buffers * buffer_nbytes + working + project_transfer_mem(transfer)


def _count_kept(states: Collection[int], state_nbytes: int) -> int:
    """Return the memory for tables that tensors of a task with other states leave for the next like them.

    Those of a tensor with the same state are taken again, and are part of its own.
    """
    return min(KEPT_NBYTES, max((nbytes for nbytes in states if nbytes != state_nbytes), default=0))


def project_transfer_mem(transfer: Transfer) -> int:
    """Return the memory of a worker besides input buffers and arithmetic, in bytes."""
    squares = (transfer.num_outputs - 1) * _SQUARES_NBYTES
    return 2 * transfer.num_outputs * OUTPUT_BUFFER_NBYTES + squares + transfer.nbytes + WORKER_NBYTES


def check_fits(demands: Mapping[str, Demand], allowed_mem: int, transfer: Transfer) -> None:
    """Refuse tensors that even one worker cannot merge with all of the memory.

    Args:
        demands: by the tensor's name.
        allowed_mem: in bytes.
        transfer: of each worker.

    Raises:
        MemoryLimitError: naming the most demanding tensor, both figures and the smallest limit that works.
    """

    def project(demands: Collection[Demand]) -> int:
        return project_mem(demands, largest_block(demands), transfer)

    refuse_more(demands, project, allowed_mem, "--memory")


def refuse_more(
    demands: Mapping[str, Demand], project: Callable[[Collection[Demand]], int], allowed: int, option: str
) -> None:
    """Refuse tensors that need more memory than is allowed.

    Args:
        demands: by the tensor's name.
        project: returns the memory for tensors, in bytes.
        allowed: in bytes.
        option: that allows it, `--memory` or `--gpu-memory`.

    Raises:
        MemoryLimitError: naming the most demanding tensor, both figures and the smallest limit that works.
    """
    needed = project(set(demands.values()))
    if needed > allowed:
        name = max(demands, key=lambda name: project([demands[name]]))
        where = " on a GPU" if option == "--gpu-memory" else ""
        raise MemoryLimitError(
            f"{name} needs {format_memory(needed)}{where} for one block of each source with scratch and output buffers,"
            f" and {format_memory(allowed)} are allowed; "
            f"the smallest limit that works is {option} {format_memory(needed)}"
        )


def largest_block(demands: Collection[Demand]) -> int:
    """Return the largest block of all sources of one tensor, in bytes, with what they take besides."""
    return max(demand.least_nbytes for demand in demands)
