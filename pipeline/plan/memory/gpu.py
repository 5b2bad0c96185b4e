"""Memory of a task that a GPU merges: on the GPU, and of the host. Pure, without I/O.

Sources wait on the GPU, in one of two rooms, until all passes over them are done. They get there through two small
buffers of the host, and are merged piece by piece, so that there is scratch for a piece only.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from raymerge.pipeline.plan.memory.projection import Demand, Transfer, largest_block, project_transfer_mem, refuse_more
from raymerge.pipeline.stores.files import ALIGNMENT

CONTEXT_NBYTES = 640 * 2**20
"""Memory that CUDA takes of a GPU for each process that uses it. Measured on an H200: 622 MiB."""

WORKERS_PER_GPU = 8
"""Workers that one GPU is fast with: more of them wait for each other. Measured on an H200 with 1, 8 and 16: linear
takes 9.8, 2.8 and 2.9 s, TIES 13.3, 7.3 and 8.4 s."""

_MAX_PIECE_NBYTES = 64 * 2**20
_SMALL_PIECE_NBYTES = 32 * 2**20
"""Bytes of all sources that are merged at once, unless a block is larger: kernels of smaller pieces end before the next
ones are queued."""


def choose_room_nbytes(
    demands: Collection[Demand], worker_mem: int, worker_gpu_mem: int, transfer: Transfer
) -> tuple[int, int]:
    """Return the size of a room for sources, and how much of it is merged at once.

    Args:
        demands: of all tensors.
        worker_mem: what one worker may use of the host, in bytes.
        worker_gpu_mem: what one worker may use of a GPU besides CUDA's context, in bytes.
        transfer: of each worker.

    Returns:
        As much as is useful and fits: room for as many tensors as possible, then large pieces. Less than
        `max(block_nbytes)` where the memory does not suffice.
    """
    largest = largest_block(demands)
    choices = []
    piece = max(_MAX_PIECE_NBYTES, largest)
    while piece >= largest:
        besides = project_gpu_mem(demands, 0, piece, transfer)
        room = (worker_gpu_mem - besides) // transfer.num_buffers // ALIGNMENT * ALIGNMENT
        if room >= piece and project_staged_mem(demands, piece, transfer) <= worker_mem:
            kept = max((demand.kept_nbytes for demand in demands if demand.kept_nbytes <= room), default=0)
            choices.append((max(piece, kept), piece))
            if piece <= _SMALL_PIECE_NBYTES:
                break
        if piece == largest:
            break
        piece = max(largest, piece // 2)
    if not choices:
        return largest - 1, largest
    most = choices[-1][0]  # the smaller the pieces, the larger the room
    return next(choice for choice in choices if choice[0] >= most)


def project_gpu_mem(demands: Collection[Demand], room_nbytes: int, piece_nbytes: int, transfer: Transfer) -> int:
    """Return the peak memory of a task on its GPU besides CUDA's context, in bytes.

    Rooms for the sources; scratch, and two results of each output, for a piece.
    """
    working = max(demand.of_window(demand.working_nbytes, piece_nbytes) for demand in demands)
    results = 2 * transfer.num_outputs * max(out_slot_nbytes(demand, piece_nbytes) for demand in demands)
    return transfer.num_buffers * room_nbytes + working + results


def project_staged_mem(demands: Collection[Demand], piece_nbytes: int, transfer: Transfer) -> int:
    """Return the peak memory that a task on a GPU takes of the host, in bytes.

    Two buffers that sources go through, and two results of each output.
    """
    results = 2 * transfer.num_outputs * max(out_slot_nbytes(demand, piece_nbytes) for demand in demands)
    return 2 * transfer.staging_nbytes + results + project_transfer_mem(transfer)


def out_slot_nbytes(demand: Demand, piece_nbytes: int) -> int:
    """Return the room for the results of one piece that comes from a GPU: their norm, and the values."""
    return ALIGNMENT + demand.of_window(demand.out_nbytes, piece_nbytes)


def check_fits_gpu(demands: Mapping[str, Demand], allowed_mem: int, allowed_gpu_mem: int, transfer: Transfer) -> None:
    """Refuse tensors that even one worker cannot merge on a GPU with all of the memory.

    Args:
        demands: by the tensor's name.
        allowed_mem: of the host, in bytes.
        allowed_gpu_mem: of one GPU, in bytes.
        transfer: of each worker.

    Raises:
        MemoryLimitError: naming the most demanding tensor, both figures and the smallest limit that works.
    """

    def project(demands: Collection[Demand]) -> int:
        return project_staged_mem(demands, largest_block(demands), transfer)

    def project_there(demands: Collection[Demand]) -> int:
        largest = largest_block(demands)
        return CONTEXT_NBYTES + project_gpu_mem(demands, largest, largest, transfer)

    refuse_more(demands, project, allowed_mem, "--memory")
    refuse_more(demands, project_there, allowed_gpu_mem, "--gpu-memory")
