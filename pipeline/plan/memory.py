"""How much memory a task takes, added up before anything runs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import lru_cache

from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel, Site
from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.resolve import COPY
from raymerge.pipeline.plan.types import ParameterValue, TensorMerge
from raymerge.pipeline.sizes import format_memory
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES

COMPUTE_NBYTES = 4
"""Bytes of a float32."""

MAX_BUFFER_NBYTES = 64 * 2**20
"""Holds a layer's matrix of several models for all passes; larger buffers do not pay, for fresh memory costs more than
reading a file again from the page cache."""

CONTEXT_NBYTES = 640 * 2**20
"""What CUDA takes of a GPU for each process, and for what operations allocate for themselves. An estimate: not measured
yet."""

ALIGNMENT = 64
"""Each source's bytes start at a multiple of this in an input buffer."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one output tensor needs at least."""

    block_elements: int
    """Of its grid."""
    num_blocks: int
    """Of its grid, in the whole tensor."""
    num_passes: int
    """How often it is measured before it is combined."""
    block_nbytes: int
    """One block of every source, as stored."""
    scratch_nbytes: int
    """Blocks in the compute dtype, the result among them."""
    state_nbytes: int
    """What the kernel keeps besides."""
    out_nbytes: int
    """One block of the output, as stored."""

    @property
    def working_nbytes(self) -> int:
        """Memory besides input and output buffers."""
        return self.scratch_nbytes + self.state_nbytes

    def of_window(self, nbytes: int, buffer_nbytes: int) -> int:
        """Return what is `nbytes` for one block for all blocks of a window, of which a buffer holds one at least."""
        if self.num_blocks <= 1:
            return nbytes * self.num_blocks
        return -(-nbytes * min(self.num_blocks * self.block_nbytes, buffer_nbytes) // self.block_nbytes)


def measure_demand(merge: TensorMerge) -> Demand:
    """Return what a tensor needs."""
    if merge.op == COPY:
        block_elements, num_passes, num_scratch, state_nbytes = BLOCK_ELEMENTS, 0, 0, 0
    else:
        kernel = _make_kernel(merge.op, merge.parameters)
        site = Site(merge.name, merge.shape, len(merge.sources), seed=0)
        block_elements, num_passes = max(1, kernel.grid(site)), kernel.num_passes(site)
        num_scratch = 1 + kernel.num_scratch(site)
        state_nbytes = kernel.state_nbytes(site)
    num_elements = min(block_elements, merge.num_elements)
    return Demand(
        block_elements,
        -(-merge.num_elements // block_elements),
        num_passes,
        sum(aligned(stored_nbytes(source.dtype, num_elements)) for source in merge.sources),
        num_scratch * num_elements * COMPUTE_NBYTES,
        state_nbytes,
        0 if merge.op == COPY else stored_nbytes(merge.out_dtype, num_elements),
    )


@lru_cache(maxsize=256)
def _make_kernel(op: str, parameters: tuple[tuple[str, ParameterValue], ...]) -> Kernel:
    """Return a kernel to ask for its demands; most tensors of a merge have the same parameters."""
    return find_op(op).kernel(dict(parameters))


@dataclass(frozen=True, slots=True)
class Transfer:
    """What reading and writing take, in each worker."""

    num_buffers: int = 1
    """Input buffers: 2 where the next is filled while one is merged."""
    nbytes: int = 0
    """Memory that the storages take besides."""


def choose_buffer_nbytes(
    demands: Collection[Demand], worker_mem: int, transfer: Transfer, worker_gpu_mem: int | None = None
) -> int:
    """Return the size of one input buffer for tensors with these demands.

    Args:
        demands: of all tensors.
        worker_mem: what one worker may use, in bytes.
        transfer: of each worker.
        worker_gpu_mem: what one worker may use of a GPU, in bytes; None to merge on the CPU.

    Returns:
        As much as is useful and fits; less than `max(block_nbytes)` where the memory does not suffice.
    """
    largest = _largest_block(demands)
    useful = max(MAX_BUFFER_NBYTES, largest)
    if worker_gpu_mem is None:
        room = worker_mem - project_mem(demands, 0, transfer)
        return min(useful, room // transfer.num_buffers // ALIGNMENT * ALIGNMENT)

    def fits(nbytes: int) -> bool:
        return (
            project_mem(demands, nbytes, transfer, on_gpu=True) <= worker_mem
            and project_gpu_mem(demands, nbytes) <= worker_gpu_mem
        )

    while useful > largest and not fits(useful):
        useful = max(largest, useful // 2 // ALIGNMENT * ALIGNMENT)
    return useful if fits(useful) else largest - 1


def project_mem(demands: Collection[Demand], buffer_nbytes: int, transfer: Transfer, *, on_gpu: bool = False) -> int:
    """Return the peak memory of a task for tensors, scratch and transfers, in bytes.

    Where a GPU merges, there is no scratch, but two buffers for the results of a window.
    """
    if on_gpu:
        working = 2 * max(out_slot_nbytes(demand, buffer_nbytes) for demand in demands)
    else:
        working = max(demand.working_nbytes for demand in demands)
    return transfer.num_buffers * buffer_nbytes + working + 2 * OUTPUT_BUFFER_NBYTES + transfer.nbytes


def project_gpu_mem(demands: Collection[Demand], buffer_nbytes: int) -> int:
    """Return the peak memory of a task on its GPU, in bytes.

    Two windows of the inputs, two of the results, and scratch for one, for a GPU takes a window at once.
    """
    working = max(demand.of_window(demand.working_nbytes, buffer_nbytes) for demand in demands)
    results = 2 * max(out_slot_nbytes(demand, buffer_nbytes) for demand in demands)
    return 2 * buffer_nbytes + working + results + CONTEXT_NBYTES


def out_slot_nbytes(demand: Demand, buffer_nbytes: int) -> int:
    """Return the room for the results of one window that comes from a GPU: their sum, and the values."""
    return ALIGNMENT + demand.of_window(demand.out_nbytes, buffer_nbytes)


def check_fits(
    demands: Mapping[str, Demand], allowed_mem: int, transfer: Transfer, allowed_gpu_mem: int | None = None
) -> None:
    """Refuse tensors that even one worker cannot merge with all of the memory.

    Args:
        demands: by the tensor's name.
        allowed_mem: in bytes.
        transfer: of each worker.
        allowed_gpu_mem: of one GPU, in bytes; None to merge on the CPU.

    Raises:
        MemoryLimitError: naming the most demanding tensor, both figures and the smallest limit that works.
    """
    on_gpu = allowed_gpu_mem is not None

    def project(demands: Collection[Demand]) -> int:
        return project_mem(demands, _largest_block(demands), transfer, on_gpu=on_gpu)

    def project_on_gpu(demands: Collection[Demand]) -> int:
        return project_gpu_mem(demands, _largest_block(demands))

    _refuse_more(demands, project, allowed_mem, "--memory")
    if allowed_gpu_mem is not None:
        _refuse_more(demands, project_on_gpu, allowed_gpu_mem, "--gpu-memory")


def _refuse_more(
    demands: Mapping[str, Demand], project: Callable[[Collection[Demand]], int], allowed: int, option: str
) -> None:
    needed = project(set(demands.values()))
    if needed > allowed:
        name = max(demands, key=lambda name: project([demands[name]]))
        where = " on a GPU" if option == "--gpu-memory" else ""
        raise MemoryLimitError(
            f"{name} needs {format_memory(needed)}{where} for one block of each source with scratch and output buffers,"
            f" and {format_memory(allowed)} are allowed; "
            f"the smallest limit that works is {option} {format_memory(needed)}"
        )


def _largest_block(demands: Collection[Demand]) -> int:
    return max(demand.block_nbytes for demand in demands)


def aligned(nbytes: int) -> int:
    """Round up to where the next source may start in a buffer.

    >>> aligned(1), aligned(64)
    (64, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def stored_nbytes(dtype: str, num_elements: int) -> int:
    """Return the size of so many elements in a dtype of whole bytes, in bytes."""
    return num_elements * DTYPES[dtype].num_bits // 8
