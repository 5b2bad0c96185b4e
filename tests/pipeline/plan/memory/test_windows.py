from __future__ import annotations

import dataclasses
import math
from collections import defaultdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.plan.memory.projection import Transfer, measure_demand
from raymerge.pipeline.plan.memory.shares import Limits
from raymerge.pipeline.plan.memory.windows import Window, is_resident, make_fetches, make_windows
from raymerge.pipeline.plan.shards import make_tasks
from raymerge.pipeline.plan.sources.merged import MergedTensor
from raymerge.pipeline.plan.types import ShardTask, TensorMerge
from raymerge.pipeline.stores.files import aligned
from tests.pipeline.plan.layouts import make_merge

TIES: dict[str, Any] = {
    "weight": (1.0, 1.0),
    "density": (0.5, 0.5),
    "normalize": True,
    "rescale": False,
    "lambda": 1.0,
}
SIZES = st.one_of(st.integers(0, 300), st.integers(2**16 - 2, 2**16 + 2), st.integers(2**17 - 2, 2**21))


@st.composite
def merges(draw: st.DrawFn) -> TensorMerge:
    kind = draw(st.sampled_from(["linear", "slerp", "ties", "copy"]))
    num_elements = draw(SIZES)
    name = draw(st.text("abc.0", min_size=1, max_size=4))
    floats = st.sampled_from(["BF16", "F32", "F64", "F16"])
    if kind == "copy":
        return make_merge(name, num_elements, op="copy", parameters={}, dtypes=("I64", "I64"), out_dtype="I64")
    if kind == "slerp":
        return make_merge(name, num_elements, op="slerp", parameters={"t": 0.5}, dtypes=(draw(floats), draw(floats)))
    if kind == "ties":
        return make_merge(name, num_elements, op="ties", parameters=TIES, dtypes=tuple(draw(floats) for _ in "abc"))
    return make_merge(name, num_elements, dtypes=tuple(draw(st.lists(floats, min_size=1, max_size=6))))


def make_task(*merges: TensorMerge, mem: int = 2**30) -> ShardTask:
    tasks, *_ = make_tasks(merges, Limits(mem, 1, 2**60))
    return tasks[0]


@settings(deadline=None)
@given(merges(), st.data())
def test_windows_cover_every_element_once_in_each_pass(merge: TensorMerge, data: st.DataObject) -> None:
    demand = measure_demand(merge)
    largest = max(demand.block_nbytes, sum(aligned(source.nbytes) for source in merge.sources) + 1)
    buffer_nbytes = data.draw(st.integers(max(1, demand.block_nbytes), largest))
    fetch_nbytes = data.draw(st.integers(1, largest))
    most = buffer_nbytes if demand.num_passes else min(buffer_nbytes, max(fetch_nbytes, demand.block_nbytes))
    windows = list(make_windows(merge, demand, buffer_nbytes, fetch_nbytes))
    steps = [(index, window) for window in windows for index in window.passes]
    assert [index for index, _ in steps] == sorted(index for index, _ in steps), "passes come one after the other"
    for index in range(demand.num_passes + 1):
        own = [window for step, window in steps if step == index]
        edges = [0, *(window.stop for window in own)]
        assert [window.start for window in own] == edges[:-1]
        assert edges[-1] == merge.num_elements
    for window in windows:
        assert window.nbytes() <= most
        assert window.start % demand.block_elements == 0
        assert window.stop % demand.block_elements == 0 or window.stop == merge.num_elements
    assert (len(windows) == 1 and windows[0].passes == range(demand.num_passes + 1)) or not is_resident(merge, most)


@settings(deadline=None, max_examples=50)
@given(st.lists(merges(), min_size=1, max_size=8, unique_by=lambda merge: merge.name), st.integers(24, 200))
def test_fetches_read_every_byte_as_often_as_planned(all_merges: list[TensorMerge], mem: int) -> None:
    task = make_task(*all_merges, mem=mem * 2**20)
    fetches = list(make_fetches(task))
    assert all(fetch for fetch in fetches)
    assert all(sum(window.nbytes() for window in fetch) <= task.buffer_nbytes for fetch in fetches)
    assert sum(r.nbytes for fetch in fetches for window in fetch for (r,) in window.ranges) == (
        task.read_nbytes + task.reread_nbytes
    )
    order = [window.merge.name for fetch in fetches for window in fetch]
    assert list(dict.fromkeys(order)) == [merge.name for merge in task.merges], "as they are written"
    starts: dict[str, list[int]] = defaultdict(list)
    for fetch in fetches:
        for window in fetch:
            for source, (piece,) in zip(window.merge.sources, window.ranges, strict=True):
                (stored,) = source.origins
                assert piece.file == stored.file
                assert stored.start <= piece.start <= piece.stop <= stored.stop
            starts[window.merge.name].append(window.start)
    for merge in task.merges:
        rounds = starts[merge.name].count(0)
        num_passes = measure_demand(merge).num_passes
        assert rounds == (1 if is_resident(merge, task.buffer_nbytes) else num_passes + 1) or not merge.num_elements


@pytest.mark.parametrize("room", [0, 1])
def test_a_tensor_that_just_fits_is_read_once(room: int) -> None:
    merge = make_merge(num_elements=10**6, op="slerp", parameters={"t": 0.5})
    nbytes = 2 * aligned(2 * 10**6)
    windows = list(make_windows(merge, measure_demand(merge), nbytes - room, nbytes))
    if room:
        blocks = (nbytes - 1) // measure_demand(merge).block_nbytes
        assert len(windows) == 2 * math.ceil(10**6 / (blocks * measure_demand(merge).block_elements))
    else:
        assert [(w.start, w.stop, w.passes) for w in windows] == [(0, 10**6, range(2))]


@pytest.mark.parametrize("is_last_measured", [False, True])
def test_passes_of_merges_on_the_way_read_what_they_measure(is_last_measured: bool) -> None:
    sources = make_merge("w", 2**26, dtypes=("BF16",) * 6).sources
    slerp = make_merge("w", 2**26, op="slerp", parameters={"t": 0.5}, dtypes=("BF16",) * 2)
    linear = make_merge("w", 2**26, dtypes=("BF16",) * 2)

    def nest(merge: TensorMerge, *sources: Source) -> MergedTensor:
        return MergedTensor("m", "w", "BF16", merge.shape, dataclasses.replace(merge, sources=sources))

    below = nest(slerp, nest(linear, nest(slerp, *sources[:2]), sources[2]), sources[3])  # measured in two passes
    beside = nest(slerp, *sources[4:])
    merge = nest(slerp if is_last_measured else linear, beside, below).merge
    limits = Limits(2**30, 1, 2**60, transfer=Transfer(fetch_nbytes=2**24), is_cached=True)
    (task,) = make_tasks([merge], limits)[0]
    windows = [window for fetch in make_fetches(task) for window in fetch]
    expected = [sources[:2] + sources[4:], sources[:4], sources, sources][: 3 + is_last_measured]
    for index, measured in enumerate(expected):
        found: dict[str, int] = defaultdict(int)
        for window in windows:
            for piece in window.wanted if index in window.passes else ():
                found[piece.file.url] += piece.nbytes
        assert found == {f"/{source.model}/model.safetensors": source.nbytes for source in measured}
    assert windows[-1].passes == range(len(expected) - 1, len(expected))
    assert sum(piece.nbytes for window in windows for piece in window.wanted) == task.read_nbytes + task.reread_nbytes


def test_ranges_of_a_window_lie_in_its_sources() -> None:
    merge = make_merge(num_elements=1000, dtypes=("BF16", "F32"), start=500)
    ranges = Window(merge, 100, 300, range(1)).ranges
    assert [(r.start, r.stop) for (r,) in ranges] == [(700, 1100), (900, 1700)]


@given(st.integers(1, 20), st.integers(-1, 1))
def test_a_buffer_is_filled_to_the_last_byte_and_no_further(num_tensors: int, more: int) -> None:
    task = make_task(*(make_merge(f"w{k}", 32) for k in range(20)))
    task = dataclasses.replace(task, buffer_nbytes=num_tensors * 2 * 64 + more)
    if task.buffer_nbytes >= 2 * 64:
        expected = num_tensors if more >= 0 else num_tensors - 1
        sizes = [len(fetch) for fetch in make_fetches(task)]
        assert max(sizes) == sizes[0] == expected
        assert sum(sizes) == 20


def test_a_large_buffer_is_for_large_tensors_and_not_for_many_small_ones() -> None:
    large = make_merge("large", 2**26, op="slerp", parameters={"t": 0.5})
    small = [make_merge(f"small{k}", 2**22) for k in range(10)]  # 16 MiB of two sources
    task = dataclasses.replace(make_task(*small[:5], large, *small[5:]), buffer_nbytes=2**28)
    assert [len(fetch) for fetch in make_fetches(task)] == [4, 1, 1, 4, 1]


def test_small_tensors_are_fetched_together() -> None:
    merges = [make_merge(f"w{k}", 1000) for k in range(100)]
    assert [len(fetch) for fetch in make_fetches(make_task(*merges))] == [100]


def test_an_empty_tensor_has_one_empty_window() -> None:
    merge = make_merge(num_elements=0)
    assert [(w.start, w.stop) for w in make_windows(merge, measure_demand(merge), 1, 1)] == [(0, 0)]
