"""Shares of the memory: the number of workers, and the tasks that get several shares.

A tensor that is measured before it is combined is read once if the buffer holds all of its sources, and once more for
each pass if it does not. Pure, without I/O.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from raymerge.pipeline.plan.memory.gpu import CONTEXT_NBYTES, choose_room_nbytes, project_gpu_mem
from raymerge.pipeline.plan.memory.projection import (
    TENSOR_NBYTES,
    Demand,
    Transfer,
    choose_buffer_nbytes,
    largest_block,
    measure_demand,
    project_mem,
)
from raymerge.pipeline.plan.types import Gpus, ShardTask
from raymerge.pipeline.sizes import format_memory, parse_nbytes

_SMALL = 0.1
"""Share of the inputs that is not worth giving up workers for."""

_FEW = 0.5
"""Share of the inputs that is read by tasks with several shares of a GPU, at most: with more of them, few would run."""

_READ_SPEED = 2e9
_MERGE_SPEED = 0.5e9
"""Bytes a second that a machine reads from stores or disks, and that one worker merges: rough, to weigh one against the
other."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The user's limits."""

    allowed_mem: int
    """For tensors and scratch of all workers together, in bytes."""
    num_workers: int
    shard_nbytes: int | None
    """Largest output file, unless one tensor is larger; None for the default."""
    gpus: Gpus | None = None
    """The GPUs that merge; None to merge on the CPU."""
    runner_nbytes: int = 0
    """Memory of a worker that the runner takes while it runs a task."""
    transfer: Transfer = field(default=Transfer())
    """Memory for reading and writing."""
    task_mem: int | None = None
    """The most that a single task may use where that is less, as a machine of a cluster has less, in bytes."""
    is_cached: bool = False
    """Whether the page cache holds what was read once, so that reading it again costs next to nothing."""

    def reserve(self, num_tensors: int) -> Limits:
        """Return limits that leave room for what a worker tells of so many tensors in one task."""
        told_nbytes = TENSOR_NBYTES * num_tensors * self.transfer.num_outputs
        return replace(self, transfer=replace(self.transfer, nbytes=self.transfer.nbytes + told_nbytes))


@dataclass(frozen=True, slots=True)
class Shares:
    """Equal shares of the memory, one for each worker."""

    num_workers: int
    share_nbytes: int
    """One share, in bytes; of a GPU, where that is what decides."""
    buffer_nbytes: int
    """Size of one input buffer, for all tasks that make do with one share: a worker uses its buffers again."""
    piece_nbytes: int
    """Bytes that a GPU merges at once; 0 where the CPU merges."""
    transfer: Transfer
    task_mem: int
    """The most that a task may use to read its tensors once: that of several shares, or of its own only."""

    def choose_buffers(self, demands: Collection[Demand]) -> tuple[int, int]:
        """Return size and number of a task's input buffers.

        The largest of its tensors that is to be read once decides, as far as all of the memory holds its sources.
        """
        missing = {demand.kept_nbytes for demand in demands if demand.kept_nbytes > self.buffer_nbytes}
        for nbytes in sorted(missing, reverse=True):
            for num_buffers in range(self.transfer.num_buffers, 0, -1):
                transfer = replace(self.transfer, num_buffers=num_buffers)
                if self.project(demands, nbytes, transfer) <= self.task_mem:
                    return nbytes, num_buffers
        return self.buffer_nbytes, self.transfer.num_buffers

    def project(self, demands: Collection[Demand], buffer_nbytes: int, transfer: Transfer) -> int:
        """Return the memory of a task that shares are of, in bytes."""
        if self.piece_nbytes:
            return project_gpu_mem(demands, buffer_nbytes, self.piece_nbytes, transfer)
        return project_mem(demands, buffer_nbytes, transfer)

    def count(self, nbytes: int) -> int:
        """Return how many shares hold so many bytes."""
        return min(self.num_workers, max(1, -(-nbytes // self.share_nbytes)))

    def estimate_seconds(self, tasks: Iterable[Collection[Demand]]) -> float:
        """Return about how long tasks take: reading them, or merging them, whatever takes longer."""
        read_nbytes = worker_nbytes = 0
        for demands in tasks:
            buffer_nbytes, num_buffers = self.choose_buffers(demands)
            mem_nbytes = self.project(demands, buffer_nbytes, replace(self.transfer, num_buffers=num_buffers))
            nbytes = sum(demand.num_blocks * demand.block_nbytes for demand in demands)
            again = sum(each.num_passes * each.kept_nbytes for each in demands if each.kept_nbytes > buffer_nbytes)
            read_nbytes += nbytes + again
            worker_nbytes += nbytes * self.count(mem_nbytes)
        return max(read_nbytes / _READ_SPEED, worker_nbytes / self.num_workers / _MERGE_SPEED)


def share_out_memory(tasks: Sequence[Collection[Demand]], limits: Limits) -> tuple[Shares, int]:
    """Decide how many workers share the memory.

    Fewer than the user wants where a share does not hold a block of each tensor; and where only the shares of fewer
    hold the sources of nearly all tensors between their passes, unless the merge takes longer with them.

    Args:
        tasks: the demands of each task's tensors; one worker with all of the memory can do them.
        limits: the user's.

    Returns:
        The shares, and how many there would be if there were more tasks.
    """
    kinds = Counter(demand for demands in tasks for demand in demands)  # few, of many tensors
    most = limits.num_workers
    while most > 1 and _choose(kinds, limits, limits.transfer, most)[0] < largest_block(kinds):
        most -= 1
    shares = _make_shares(kinds, limits, limits.transfer, min(most, len(tasks)))
    if limits.gpus is not None:  # with one room, the next sources are not read before these are merged
        single = replace(limits.transfer, num_buffers=1)
        again, again_single = (_count_again(kinds, limits, t, shares.num_workers) for t in (limits.transfer, single))
        if again > _FEW * _count_kept(kinds) and again_single < again:
            shares = _make_shares(kinds, limits, single, shares.num_workers)
        return shares, most
    if limits.is_cached:
        return shares, most
    choices = []
    for num_buffers in range(1, limits.transfer.num_buffers + 1):  # with one, workers take turns in reading
        transfer = replace(limits.transfer, num_buffers=num_buffers)
        fewer = _give_up(kinds, limits, transfer, most)
        choices.append((_make_shares(kinds, limits, transfer, min(fewer, len(tasks))), fewer))
    best = max(choices, key=lambda choice: choice[0].num_workers * choice[0].transfer.num_buffers)
    is_worth = best[1] == most or best[0].estimate_seconds(tasks) <= shares.estimate_seconds(tasks) * (1 + _SMALL)
    return best if is_worth else (shares, most)


def explain_shares(tasks: Sequence[ShardTask], limits: Limits, num_allowed: int) -> list[str]:
    """Give advice where more memory would save reading, or let more workers run.

    Args:
        tasks: as planned.
        limits: the user's.
        num_allowed: workers that the memory is for.
    """
    is_read_again = any(task.spared_nbytes for task in tasks)
    if limits.gpus is not None or limits.is_cached or (num_allowed == limits.num_workers and not is_read_again):
        return []
    advice = []
    demands = [[measure_demand(merge) for merge in task.merges] for task in tasks]
    limits = limits.reserve(max(map(len, demands)))
    single = replace(limits.transfer, num_buffers=1)
    needed = max(project_mem(each, max(one.kept_nbytes for one in each), single) for each in demands)
    if needed > limits.allowed_mem and is_read_again:
        advice.append(f"with --memory {format_memory(needed)} every tensor would be read once")
    if num_allowed < limits.num_workers:
        share = max((task.projected_mem for task in tasks if task.keeps_buffers), default=limits.allowed_mem)
        text = format_memory(share * limits.num_workers)
        more = replace(limits, allowed_mem=parse_nbytes(text))
        holds = share_out_memory(demands, more)[1] == limits.num_workers
        advice.append(
            f"the memory is for {num_allowed} of {limits.num_workers} workers"
            + (f"; --memory {text} would be for all" if holds else "")
        )
    return advice


def _make_shares(kinds: Mapping[Demand, int], limits: Limits, transfer: Transfer, num_workers: int) -> Shares:
    again = _count_again(kinds, limits, transfer, num_workers)
    gpus = limits.gpus
    if gpus is None:
        may_join = not limits.is_cached or again <= _SMALL * _count_kept(kinds)
        share, task_mem = (
            limits.allowed_mem // num_workers,
            min(limits.allowed_mem, limits.task_mem or limits.allowed_mem),
        )
    else:  # of several GPUs, one might be asked for the shares of another
        share, task_mem = gpus.share(num_workers, CONTEXT_NBYTES), gpus.allowed_mem - CONTEXT_NBYTES
        may_join = gpus.num_gpus == 1 and gpus.is_in_one_process and again <= _FEW * _count_kept(kinds)
    buffer_nbytes, piece_nbytes = _choose(kinds, limits, transfer, num_workers)
    return Shares(num_workers, share, buffer_nbytes, piece_nbytes, transfer, task_mem if may_join else 0)


def _give_up(kinds: Mapping[Demand, int], limits: Limits, transfer: Transfer, num_workers: int) -> int:
    """Return how many workers' shares hold nearly all tensors between their passes that all of the memory holds."""
    bearable = _count_again(kinds, limits, transfer, 1) + _SMALL * _count_kept(kinds)
    while num_workers > 1 and _count_again(kinds, limits, transfer, num_workers) > bearable:
        num_workers -= 1
    return num_workers


def _count_again(kinds: Mapping[Demand, int], limits: Limits, transfer: Transfer, num_workers: int) -> int:
    """Return the bytes of tensors that a share does not hold between their passes."""
    buffer_nbytes, _ = _choose(kinds, limits, transfer, num_workers)
    return sum(kind.kept_nbytes * count for kind, count in kinds.items() if kind.kept_nbytes > buffer_nbytes)


def _count_kept(kinds: Mapping[Demand, int]) -> int:
    return sum(kind.kept_nbytes * count for kind, count in kinds.items())


def _choose(kinds: Collection[Demand], limits: Limits, transfer: Transfer, num_workers: int) -> tuple[int, int]:
    """Return the size of buffers, the same for all tasks, and how much of one a GPU merges at once."""
    mem = limits.allowed_mem // num_workers
    if limits.gpus is None:
        return choose_buffer_nbytes(kinds, mem, transfer), 0
    return choose_room_nbytes(kinds, mem, limits.gpus.share(num_workers, CONTEXT_NBYTES), transfer)
