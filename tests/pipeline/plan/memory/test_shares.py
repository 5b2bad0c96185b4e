"""Of which memory tensors are read once: Llama 3.1 70B, three fine-tunes and their base, as a planner sees them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from raymerge.ops.decoders.rows import make_row_map
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.views.gathered_rows import GatheredRows
from raymerge.pipeline.plan.memory.gpu import CONTEXT_NBYTES
from raymerge.pipeline.plan.memory.projection import Transfer
from raymerge.pipeline.plan.memory.shares import Limits, explain_shares
from raymerge.pipeline.plan.memory.windows import make_fetches
from raymerge.pipeline.plan.shards import make_tasks
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.types import Gpus, ShardTask, TensorMerge
from tests.pipeline.plan.layouts import make_merge

GIB = 2**30
TIES = {"weight": (0.5,) * 3, "density": (0.5,) * 3, "normalize": True, "rescale": False, "lambda": 1.0}
NUM_SOURCES = {"ties": 4, "slerp": 2, "linear": 4}
SIZES = {"large": 26, "small": 20}
"""Sizes of tensors, as powers of two."""
PARAMETERS: dict[str, dict[str, Any]] = {
    "ties": TIES,
    "slerp": {"t": 0.5},
    "linear": {"weight": (1.0,) * 4, "normalize": True},
}


def make_llama(op: str) -> list[TensorMerge]:
    """Return the output tensors of a merge of Llamas of 70 B parameters."""
    hidden, mlp, vocab = 8_192, 28_672, 128_256
    sizes = {"lm_head": vocab * hidden, "model.embed_tokens": vocab * hidden, "model.norm": hidden}
    for k in range(80):
        sizes |= {f"model.layers.{k}.mlp.{name}": hidden * mlp for name in ("down", "gate", "up")}
        sizes |= {f"model.layers.{k}.self_attn.{name}": hidden * hidden for name in ("o", "q")}
        sizes |= {f"model.layers.{k}.self_attn.{name}": hidden * hidden // 8 for name in ("k", "v")}
    dtypes = ("BF16",) * NUM_SOURCES[op]
    return [make_merge(name, size, op=op, parameters=PARAMETERS[op], dtypes=dtypes) for name, size in sizes.items()]


def plan(
    op: str, mem: int, num_workers: int, *, num_buffers: int = 2, is_cached: bool = False, gpus: Gpus | None = None
) -> tuple[tuple[ShardTask, ...], int, list[str]]:
    """Return tasks, number of workers and advice."""
    limits = Limits(mem, num_workers, None, gpus, transfer=Transfer(num_buffers), is_cached=is_cached)
    tasks, num_at_once, num_allowed = make_tasks(make_llama(op), limits)
    return tasks, num_at_once, explain_shares(tasks, limits, num_allowed)


def again(tasks: tuple[ShardTask, ...]) -> float:
    """Return the share of the inputs that is read again."""
    return sum(task.reread_nbytes for task in tasks) / sum(task.read_nbytes for task in tasks)


@pytest.mark.parametrize("num_buffers", [1, 2])
@pytest.mark.parametrize("op", ["ties", "slerp"])
def test_much_memory_reads_everything_once_and_keeps_all_workers(op: str, num_buffers: int) -> None:
    tasks, num_workers, advice = plan(op, 128 * GIB, 16, num_buffers=num_buffers)
    assert (again(tasks), num_workers, advice) == (0, 16, [])
    # of 213 shards, those of the embedding and the head
    assert sum(task.num_shares > 1 for task in tasks) <= 2


@pytest.mark.parametrize("num_buffers", [1, 2])
def test_little_memory_gives_up_workers_before_it_reads_again(num_buffers: int) -> None:
    tasks, num_workers, advice = plan("ties", 8 * GIB, 16, num_buffers=num_buffers)
    assert again(tasks) <= 0.1
    assert 2 <= num_workers < 16
    assert advice[-1].startswith(f"the memory is for {num_workers} of 16 workers; --memory ")


def test_less_than_that_streams_what_fits_nowhere_and_says_what_would_do() -> None:
    tasks, _, advice = plan("ties", 4 * GIB, 16, num_buffers=1)
    assert 0 < again(tasks) <= 0.1
    (stated,) = (line for line in advice if line.endswith("every tensor would be read once"))
    mem = int(stated.split()[2].removesuffix("MiB")) * 2**20
    assert again(plan("ties", mem, 16, num_buffers=1)[0]) == 0
    assert again(plan("ties", mem - 2**20, 16, num_buffers=1)[0]) > 0


def test_the_stated_memory_is_for_all_workers() -> None:
    *_, advice = plan("ties", 8 * GIB, 16, num_buffers=1)
    mem = int(advice[-1].split()[-5].removesuffix("MiB")) * 2**20
    _, num_workers, advice = plan("ties", mem, 16, num_buffers=1)
    assert (num_workers, advice) == (16, [])


def test_workers_are_worth_more_than_reading_again_from_the_page_cache() -> None:
    tasks, num_workers, advice = plan("ties", 4 * GIB, 16, num_buffers=1, is_cached=True)
    assert (num_workers, advice) == (16, [])
    assert again(tasks) > 1


@pytest.mark.parametrize("is_cached", [False, True])
def test_merges_on_the_way_are_made_again_rather_than_kept_beside_what_the_page_cache_keeps(is_cached: bool) -> None:
    dtypes = ("BF16",) * 2
    merges = [make_merge(name, 2**n, op="slerp", parameters={"t": 0.5}, dtypes=dtypes) for name, n in SIZES.items()]
    sources = [MergedTensor("first", each.name, "BF16", each.shape, each) for each in merges]
    nested = [replace(each, sources=(early, each.sources[1])) for each, early in zip(merges, sources, strict=True)]
    limits = Limits(4 * GIB, 1, 10**9, transfer=Transfer(fetch_nbytes=2**23), is_cached=is_cached)
    for tensors in (merges, nested):
        (task,) = make_tasks(tensors, limits)[0]
        large = 2 * 2 ** SIZES["large"]
        is_again = is_cached and tensors is nested
        assert task.reread_nbytes == ((2 + 3) * large if is_again else 0), "the first pass needs two of three"
        windows = [window for fetch in make_fetches(task) for window in fetch if window.merge.name == "large"]
        assert all(window.nbytes() <= 2**23 for window in windows) is is_again
        assert task.projected_mem < 110 * 2**20 if is_again else task.projected_mem > 2 * large


@pytest.mark.parametrize("is_cached", [False, True])
def test_rows_from_all_over_are_read_by_themselves_where_the_page_cache_keeps_them(is_cached: bool) -> None:
    merge = make_merge("embed", 2**26)
    num_rows = 2**26 // 512
    parts = tuple(
        replace(source, shape=(num_rows, 512)) for source in merge.sources if isinstance(source, StoredTensor)
    )
    rows = make_row_map(np.zeros(num_rows, np.int64), np.random.default_rng(0).permutation(num_rows), [])
    gathered = GatheredRows("m0", "embed", "BF16", (num_rows, 512), parts[:1], rows)
    merge = replace(merge, shape=(num_rows, 512), sources=(gathered, parts[1]))
    limits = Limits(4 * GIB, 1, 10**9, transfer=Transfer(fetch_nbytes=2**23), is_cached=is_cached)
    (task,) = make_tasks([merge], limits)[0]
    (source, _) = task.merges[0].sources
    assert isinstance(source, GatheredRows)
    assert (source.is_by_row, source.identity) == (is_cached, gathered.identity)
    assert task.reread_nbytes == 0
    assert task.projected_mem < 60 * 2**20 if is_cached else task.projected_mem > 2**28


def test_what_is_read_once_anyhow_takes_no_more_memory() -> None:
    tasks, num_workers, advice = plan("linear", 4 * GIB, 16)
    assert (again(tasks), num_workers, advice) == (0, 16, [])
    assert max(task.projected_mem for task in tasks) < 200 * 2**20


def test_gpus_share_alike() -> None:
    tasks, num_workers, advice = plan("ties", 128 * GIB, 16, gpus=Gpus(8, 64 * GIB))
    assert (again(tasks), num_workers, advice) == (0, 16, [])
    assert {task.num_shares for task in tasks} == {1}


@pytest.mark.parametrize("gpu_mem", [16 * GIB, 40 * GIB, 128 * GIB])
def test_a_gpu_gets_everything_once_whatever_the_host_has(gpu_mem: int) -> None:
    tasks, num_workers, _ = plan("ties", 4 * GIB, 16, is_cached=True, gpus=Gpus(1, gpu_mem))
    assert num_workers == 16
    share = (gpu_mem - CONTEXT_NBYTES) // 16
    assert all(task.projected_gpu_mem <= task.num_shares * share for task in tasks)
    assert all(task.projected_mem <= 4 * GIB // 16 for task in tasks)
    assert (again(tasks) == 0) is (gpu_mem > 16 * GIB)


def test_rooms_for_two_tensors_go_before_those_for_the_largest() -> None:
    tasks, num_workers, _ = plan("ties", 4 * GIB, 16, is_cached=True, gpus=Gpus(1, 100 * GIB))
    assert (again(tasks), num_workers, {task.num_buffers for task in tasks}) == (0, 16, {2})
    assert 1 <= sum(task.num_shares > 1 for task in tasks) <= 2, "the embedding and the head"


def test_shares_of_several_gpus_or_processes_are_not_joined() -> None:
    for gpus in (Gpus(2, 20 * GIB), Gpus(1, 20 * GIB, is_in_one_process=False)):
        tasks, num_workers, _ = plan("ties", 128 * GIB, 8, gpus=gpus)
        assert {task.num_shares for task in tasks} == {1}
        share = gpus.share(num_workers, CONTEXT_NBYTES)
        assert all(task.projected_gpu_mem <= share for task in tasks)
