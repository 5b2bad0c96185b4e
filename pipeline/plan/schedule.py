"""Use of the machine by a plan: idle workers, and GPUs that are not worth their start. Pure, without I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from heapq import heapreplace
from itertools import count

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.messages import counted
from raymerge.pipeline.plan.memory.projection import measure_demand
from raymerge.pipeline.plan.memory.windows import is_resident
from raymerge.pipeline.plan.shards import split_shards
from raymerge.pipeline.plan.types import ShardTask, TensorMerge

_WORTH_NBYTES = 10 * 10**9
"""Less is read and written in seconds, whoever has nothing to do."""

_SMALL = 0.1
"""Share of the time that is not worth a word, be it idle or saved."""

_SMALLEST_NBYTES = 10 * 10**6
"""Smaller shards are not worth the requests that they take."""

_CUDA_SECONDS = 4.6
"""Until torch and CUDA have started. Measured on one H200."""

_COMBINE_SECONDS, _MEASURE_SECONDS = 0.3e-9, 1.5e-9
"""Time of a core for each element of each source that is combined, and for each pass that measures it. Measured with
compiled loops: a weighted sum of three takes 0.5 ns, a histogram of one delta 1.2 to 1.5."""


def explain_gpus(tasks: Sequence[ShardTask], num_workers: int) -> str | None:
    """Return advice to merge on the CPU, where GPUs would save less arithmetic than their start takes.

    Reading, checksums and writing are the processors' work in either case. Kernels that need a whole tensor at once are
    made for GPUs: where there is one, this says nothing.

    Args:
        tasks: planned for GPUs.
        num_workers: cores of one machine that would merge instead.
    """
    seconds = 0.0
    for merge in (merge for task in tasks for merge in task.merges):
        demand = measure_demand(merge)
        if demand.block_elements > BLOCK_ELEMENTS:
            return None
        each = _COMBINE_SECONDS * len(merge.variants) + _MEASURE_SECONDS * demand.num_passes
        seconds += merge.num_elements * len(merge.sources) * each / num_workers
    if seconds >= _CUDA_SECONDS:
        return None
    took = "less than a second" if seconds < 1 else f"about {seconds:.0f} s"
    return (
        f"this would be faster without --gpu-memory: the arithmetic takes {counted(num_workers, 'worker')} on the CPU"
        f" {took}, and CUDA takes {_CUDA_SECONDS:.0f} s to start"
    )


def measure_cost(task: ShardTask) -> int:
    """Return the bytes that a task moves, which tell how long it takes."""
    return task.read_nbytes + task.reread_nbytes + task.nbytes


def share_out(costs: Iterable[int], num_workers: int) -> list[int]:
    """Return the final load of each worker, if each free worker takes the costliest item that is left.

    >>> sorted(share_out([2, 5, 4, 3], 2))
    [7, 7]
    """
    loads = [0] * num_workers
    for cost in sorted(costs, reverse=True):
        heapreplace(loads, loads[0] + cost)
    return loads


def measure_idle(loads: Sequence[int]) -> float:
    """Return which share of their time workers wait for the last of them.

    >>> measure_idle([10, 5]), measure_idle([7, 7]), measure_idle([0, 0])
    (0.25, 0.0, 0.0)
    """
    return 1 - sum(loads) / (len(loads) * max(loads)) if any(loads) else 0.0


def explain_idle(tasks: Sequence[ShardTask], num_workers: int) -> str | None:
    """Return advice about workers that would be idle; None where it is not worth a word.

    Args:
        tasks: of a plan.
        num_workers: tasks in work at once, on all machines together.
    """
    if any(task.num_shares > 1 for task in tasks):  # the place of several workers
        return None
    costs = [measure_cost(task) for task in tasks]
    loads = share_out(costs, num_workers)
    if sum(costs) < _WORTH_NBYTES or measure_idle(loads) <= _SMALL:
        return None
    what = f"{num_workers} workers would be idle {measure_idle(loads):.0%} of the time"
    tensors = {
        merge.name: (merge, _measure_tensor(merge, task.buffer_nbytes)) for task in tasks for merge in task.merges
    }
    name, (_, largest) = max(tensors.items(), key=lambda item: item[1][1])
    useful = max(largest, sum(costs) / num_workers) / (1 - _SMALL)  # a tensor is made by one worker
    if max(loads) <= useful:
        fewer = next(n for n in count(-(-sum(costs) // largest)) if max(share_out(costs, n)) <= useful)
        if fewer == num_workers:
            return None
        return f"{what}: {name} alone takes one of them that long; {fewer} workers would be about as fast"
    merges = [tensors[name][0] for name in sorted(tensors, key=natural_key)]
    for nbytes in _propose_sizes(max(task.nbytes for task in tasks)):
        shards = split_shards(merges, nbytes)
        proposed = share_out((sum(tensors[merge.name][1] for merge in shard) for shard in shards), num_workers)
        saved = 1 - max(proposed) / max(loads)
        if max(proposed) <= useful and saved > _SMALL:
            what += f" with {counted(len(tasks), 'shard')}"
            return f"{what}; --shard-size {_format_size(nbytes)} would take {saved:.0%} less time"
    return None


def _measure_tensor(merge: TensorMerge, buffer_nbytes: int) -> int:
    """Return a tensor's share of what its task costs."""
    num_reads = 1 if is_resident(merge, buffer_nbytes) else 1 + measure_demand(merge).num_passes
    return num_reads * sum(source.nbytes for source in merge.sources) + merge.nbytes


def _propose_sizes(nbytes: int) -> Iterator[int]:
    """Yield round sizes below one, the largest first.

    >>> list(_propose_sizes(60_000_000))
    [50000000, 30000000, 20000000, 10000000]
    """
    power = 10 ** (len(str(nbytes)) - 1)
    while power >= _SMALLEST_NBYTES:
        yield from (digit * power for digit in (7, 5, 3, 2, 1) if digit * power < nbytes)
        power //= 10


def _format_size(nbytes: int) -> str:
    """Write a round size as `--shard-size` takes it.

    >>> _format_size(2_000_000_000), _format_size(300_000_000)
    ('2GB', '300MB')
    """
    return f"{nbytes // 10**9}GB" if nbytes >= 10**9 else f"{nbytes // 10**6}MB"
