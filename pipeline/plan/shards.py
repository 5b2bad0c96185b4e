"""From a recipe to a plan: shards with their headers, memory, and the fingerprint. Pure, without I/O."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from raymerge import __version__
from raymerge.ops.own import OwnOps
from raymerge.pipeline.checkpoint.dtypes import DTYPES, count_nbytes
from raymerge.pipeline.checkpoint.header import make_header
from raymerge.pipeline.plan.memory.gpu import check_fits_gpu, project_gpu_mem, project_staged_mem
from raymerge.pipeline.plan.memory.projection import (
    MAX_FETCH_NBYTES,
    Demand,
    check_fits,
    forgo_keeping,
    measure_demand,
    project_mem,
    read_by_row,
)
from raymerge.pipeline.plan.memory.shares import Limits, Shares, share_out_memory
from raymerge.pipeline.plan.memory.windows import count_again, count_gaps
from raymerge.pipeline.plan.out_files import Network, SideFile
from raymerge.pipeline.plan.types import ShardOutput, ShardTask, TensorMerge

MAX_THREADS = 4
"""Threads that merge one shard: more of them wait for the one that hashes."""


def default_shard_nbytes(total_nbytes: int) -> int:
    """Return the default size of output files; it follows from the output's size alone, to be the same everywhere.

    It grows with the cube root of the output: 1 GB gives 8 files, enough for a laptop's cores, 140 GB about 200, enough
    for a hundred workers, and 1.3 TB files of 1.4 GB.

    >>> [default_shard_nbytes(n) // 10**6 for n in (10**6, 10**9, 15 * 10**9, 140 * 10**9, 1340 * 10**9)]
    [12, 128, 315, 664, 1411]
    """
    return max(1, int(128 * (total_nbytes / 10**9) ** (1 / 3))) * 10**6


def make_tasks(
    merges: Sequence[TensorMerge],
    limits: Limits,
    own: OwnOps | None = None,
    networks: Sequence[Network] = (Network(),),
) -> tuple[tuple[ShardTask, ...], int, int]:
    """Cut the output into files and decide how each is made.

    Args:
        merges: in natural order of names, network by network.
        limits: what the user allows.
        own: the file that declares the method, where it is of the user's own.
        networks: of the output; each has files of its own.

    Returns:
        The tasks, how many workers make them at once, and how many the memory would allow if there were more tasks.

    Raises:
        MemoryLimitError: a tensor does not fit even for one worker.
    """
    is_cached = limits.is_cached and limits.gpus is None
    if is_cached:
        merges = [read_by_row(merge) for merge in merges]
    demands = {merge.name: measure_demand(merge) for merge in merges}
    if is_cached:
        demands = {merge.name: forgo_keeping(merge, demands[merge.name]) for merge in merges}
    shard_nbytes = limits.shard_nbytes or default_shard_nbytes(sum(merge.nbytes for merge in merges))
    shards: list[tuple[TensorMerge, ...]] = []
    files: list[tuple[Network, str]] = []
    for network in networks:
        own_merges = [merge for merge in merges if merge.name.startswith(network.prefix)]
        pieces = list(split_shards(own_merges, shard_nbytes))
        shards += pieces
        files += [(network, file) for file in shard_names(len(pieces), network.stem)]
    limits = limits.reserve(max(map(len, shards)))
    if limits.gpus is None:
        check_fits(demands, limits.allowed_mem, limits.transfer)
    else:
        check_fits_gpu(demands, limits.allowed_mem, limits.gpus.allowed_mem, limits.transfer)
    shares, num_allowed = share_out_memory([[demands[merge.name] for merge in shard] for shard in shards], limits)
    total = sum(merge.nbytes for merge in merges)
    tasks = tuple(
        _make_task(own, shard, network, file, demands, shares, _count_threads(shard, total, limits, shares))
        for shard, (network, file) in zip(shards, files, strict=True)
    )
    return tasks, shares.num_workers, num_allowed


def split_shards(merges: Sequence[TensorMerge], shard_nbytes: int) -> Iterator[tuple[TensorMerge, ...]]:
    """Yield the tensors of each output file: in order, until the next would exceed the size."""
    shard: list[TensorMerge] = []
    nbytes = 0
    for merge in merges:
        if shard and nbytes + merge.nbytes > shard_nbytes:
            yield tuple(shard)
            shard, nbytes = [], 0
        shard.append(merge)
        nbytes += merge.nbytes
    if shard:
        yield tuple(shard)


def shard_names(num_shards: int, stem: str = "model") -> list[str]:
    """Return the names of the output files, as Hugging Face loaders expect them.

    >>> shard_names(1), shard_names(2)
    (['model.safetensors'], ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors'])
    """
    if num_shards == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{k:05d}-of-{num_shards:05d}.safetensors" for k in range(1, num_shards + 1)]


def make_fingerprint(
    tasks: Sequence[ShardTask], side_files: Iterable[SideFile], output: int = 0, origin: str = ""
) -> str:
    """Return a hash of everything that decides what a model is: recipes, inputs as they are, seed, layout, version.

    Where the inputs lie does not matter if their etags tell, nor do memory and workers.

    Args:
        tasks: the shards.
        side_files: the output's other files.
        output: which of the plan's outputs.
        origin: of an op that is not raymerge's own.
    """
    digest = hashlib.sha256(json.dumps([__version__, [file.identity for file in side_files]]).encode())
    digest.update(origin.encode())
    for task in tasks:
        digest.update(task.outputs[output].header)
        for merge in task.merges:
            variant = merge.variants[output]
            sources = [source.identity for source in merge.sources]
            record = [task.file, merge.name, merge.op, variant.parameters, variant.seed, sources]
            digest.update(json.dumps(record, ensure_ascii=False).encode())
    return digest.hexdigest()


def _count_threads(merges: Sequence[TensorMerge], total_nbytes: int, limits: Limits, shares: Shares) -> int:
    """Return how many threads merge a shard, so that it takes about as long as an equal share of all does on one core.

    Cores that have no worker of their own help as well.
    """
    idle = limits.num_workers // shares.num_workers
    needed = round(limits.num_workers * sum(merge.nbytes for merge in merges) / max(1, total_nbytes))
    return min(MAX_THREADS, max(1, idle, needed))


def _make_task(
    own_ops: OwnOps | None,
    merges: Sequence[TensorMerge],
    network: Network,
    file: str,
    demands: Mapping[str, Demand],
    shares: Shares,
    num_threads: int,
) -> ShardTask:
    own = [demands[merge.name] for merge in merges]
    buffer_nbytes, num_buffers = shares.choose_buffers(own)
    transfer = replace(shares.transfer, num_buffers=num_buffers)
    fetch_nbytes = transfer.fetch_nbytes
    projected_gpu_mem = 0
    if piece := shares.piece_nbytes:
        projected_mem = project_staged_mem(own, piece, transfer)
        projected_gpu_mem = project_gpu_mem(own, buffer_nbytes, piece, transfer)
    else:
        wide = min(MAX_FETCH_NBYTES, fetch_nbytes * num_threads)  # something for each thread
        if wide <= buffer_nbytes or project_mem(own, wide, transfer) <= shares.share_nbytes:
            buffer_nbytes, fetch_nbytes = max(wide, buffer_nbytes), wide
        projected_mem = project_mem(own, buffer_nbytes, transfer)
    num_shares = shares.count(projected_gpu_mem or projected_mem)
    # Wide dtypes first, so that every tensor is aligned to its own dtype in the file.
    ordered = tuple(sorted(merges, key=lambda merge: -DTYPES[merge.out_dtype].num_bits))
    header = make_header(
        [
            (name.removeprefix(network.prefix), merge.out_dtype, shape, count_nbytes(shape, merge.out_dtype))
            for merge in ordered
            for name, shape in merge.entries
        ]
    )
    again = {merge.name: count_again(merge, buffer_nbytes, fetch_nbytes) for merge in merges}
    read = {merge.name: sum(source.nbytes for source in merge.sources) for merge in merges}
    output = ShardOutput(f"{network.prefix}{file}", header, len(header) + sum(merge.nbytes for merge in merges))
    task = ShardTask(
        own=own_ops,
        outputs=(output,) * transfer.num_outputs,
        positions=tuple(range(transfer.num_outputs)),
        merges=ordered,
        read_nbytes=sum(read.values()),
        reread_nbytes=sum(again.values()),
        spared_nbytes=sum(again[merge.name] for merge in merges if demands[merge.name].kept_nbytes > buffer_nbytes),
        buffer_nbytes=buffer_nbytes,
        fetch_nbytes=fetch_nbytes,
        piece_nbytes=piece,
        staging_nbytes=transfer.staging_nbytes,
        num_buffers=num_buffers,
        keeps_buffers=buffer_nbytes == shares.buffer_nbytes,
        num_threads=max(num_threads, min(MAX_THREADS, num_shares)),
        num_shares=num_shares,
        projected_mem=projected_mem,
        projected_gpu_mem=projected_gpu_mem,
    )
    return replace(task, read_nbytes=task.read_nbytes + count_gaps(task))
