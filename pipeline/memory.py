"""How much memory a task takes, added up before anything runs."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache

from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel
from raymerge.ops.registry import find_op
from raymerge.pipeline.dtypes import DTYPES
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.sizes import format_memory
from raymerge.pipeline.storage import OUTPUT_BUFFER_NBYTES
from raymerge.pipeline.tensor_merge import COPY
from raymerge.pipeline.types import ParameterValue, TensorMerge

COMPUTE_NBYTES = 4
"""Bytes of a float32."""

MAX_BUFFER_NBYTES = 64 * 2**20
"""Holds a layer's matrix of several models for all passes; larger buffers do not pay, for fresh memory costs more than
reading a file again from the page cache."""

ALIGNMENT = 64
"""Each source's bytes start at a multiple of this in an input buffer."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one output tensor needs at least."""

    block_elements: int
    """Of its grid."""
    num_passes: int
    """How often it is measured before it is combined."""
    block_nbytes: int
    """One block of every source, as stored."""
    scratch_nbytes: int
    """Blocks in the compute dtype, the result among them."""
    state_nbytes: int
    """What the kernel keeps besides."""

    @property
    def working_nbytes(self) -> int:
        """Memory besides input and output buffers."""
        return self.scratch_nbytes + self.state_nbytes


def measure_demand(merge: TensorMerge) -> Demand:
    """Return what a tensor needs."""
    if merge.op == COPY:
        block_elements, num_passes, num_scratch, state_nbytes = BLOCK_ELEMENTS, 0, 0, 0
    else:
        kernel = _make_kernel(merge.op, merge.parameters)
        block_elements, num_passes = kernel.block_elements, kernel.num_passes
        num_scratch = 1 + kernel.num_scratch(len(merge.sources))
        state_nbytes = kernel.state_nbytes(len(merge.sources))
    num_elements = min(block_elements, merge.num_elements)
    return Demand(
        block_elements,
        num_passes,
        sum(aligned(stored_nbytes(source.dtype, num_elements)) for source in merge.sources),
        num_scratch * num_elements * COMPUTE_NBYTES,
        state_nbytes,
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


def choose_buffer_nbytes(demands: Collection[Demand], worker_mem: int, transfer: Transfer) -> int:
    """Return the size of one input buffer for tensors with these demands.

    Args:
        demands: of all tensors.
        worker_mem: what one worker may use, in bytes.
        transfer: of each worker.

    Returns:
        As much as is useful and fits; less than `max(block_nbytes)` where the memory does not suffice.
    """
    working = max(demand.working_nbytes for demand in demands)
    useful = max(MAX_BUFFER_NBYTES, *(demand.block_nbytes for demand in demands))
    room = worker_mem - working - 2 * OUTPUT_BUFFER_NBYTES - transfer.nbytes
    return min(useful, room // transfer.num_buffers // ALIGNMENT * ALIGNMENT)


def project_mem(demands: Iterable[Demand], buffer_nbytes: int, transfer: Transfer) -> int:
    """Return the peak memory of a task for tensors, scratch and transfers, in bytes."""
    working = max(demand.working_nbytes for demand in demands)
    return transfer.num_buffers * buffer_nbytes + working + 2 * OUTPUT_BUFFER_NBYTES + transfer.nbytes


def check_fits(demands: Mapping[str, Demand], allowed_mem: int, transfer: Transfer) -> None:
    """Refuse tensors that even one worker cannot merge with all of the memory.

    Args:
        demands: by the tensor's name.
        allowed_mem: in bytes.
        transfer: of each worker.

    Raises:
        MemoryLimitError: naming the most demanding tensor, both figures and the smallest limit that works.
    """
    needed = project_mem(demands.values(), max(demand.block_nbytes for demand in demands.values()), transfer)
    if needed > allowed_mem:
        name = max(demands, key=lambda name: project_mem([demands[name]], demands[name].block_nbytes, transfer))
        raise MemoryLimitError(
            f"{name} needs {format_memory(needed)} for one block of each source with scratch and output buffers, "
            f"and {format_memory(allowed_mem)} are allowed; "
            f"the smallest limit that works is --memory {format_memory(needed)}"
        )


def aligned(nbytes: int) -> int:
    """Round up to where the next source may start in a buffer.

    >>> aligned(1), aligned(64)
    (64, 64)
    """
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def stored_nbytes(dtype: str, num_elements: int) -> int:
    """Return the size of so many elements in a dtype of whole bytes, in bytes."""
    return num_elements * DTYPES[dtype].num_bits // 8
