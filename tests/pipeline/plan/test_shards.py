from __future__ import annotations

import dataclasses
import math
import pickle
import re
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.files import CONFIG
from raymerge.pipeline.checkpoint.header import parse_header
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.memory.gpu import CONTEXT_NBYTES
from raymerge.pipeline.plan.memory.projection import (
    MAX_FETCH_NBYTES,
    TENSOR_NBYTES,
    Transfer,
    measure_demand,
    project_mem,
)
from raymerge.pipeline.plan.memory.shares import Limits
from raymerge.pipeline.plan.out_files import Written
from raymerge.pipeline.plan.shards import (
    default_shard_nbytes,
    make_fingerprint,
    make_tasks,
    shard_names,
    split_shards,
)
from raymerge.pipeline.plan.types import Gpus, ShardTask, TensorMerge
from raymerge.pipeline.sizes import parse_nbytes
from raymerge.pipeline.stores.files import StoredFile
from tests.pipeline.plan.layouts import make_merge, make_variant

NAMES = st.text('abé.012"\\ \n', min_size=1, max_size=8)
MERGES = st.lists(
    st.builds(
        make_merge,
        NAMES,
        st.integers(0, 400),
        dtypes=st.sampled_from([("BF16",), ("BF16", "F32"), ("F32",) * 3]),
        out_dtype=st.sampled_from(["BF16", "F16", "F32", "F64"]),
    ),
    min_size=1,
    max_size=12,
    unique_by=lambda merge: merge.name,
).map(lambda merges: sorted(merges, key=lambda merge: natural_key(merge.name)))
LARGE = st.lists(
    st.builds(
        make_merge,
        st.text("abc", min_size=1, max_size=4),
        st.integers(1, 2**24),
        dtypes=st.integers(1, 90).map(lambda n: ("BF16",) * n),
    )
    | st.builds(
        lambda name, size: make_merge(name, size, op="slerp", parameters={"t": 0.5}),
        st.text("abc", min_size=1, max_size=4),
        st.integers(1, 2**26),
    ),
    min_size=1,
    max_size=6,
    unique_by=lambda merge: merge.name,
)


def plan(merges: list[TensorMerge], *, mem: int = 2**30, workers: int = 2, shard: int | None = None, seed: int = 0) -> (
    tuple[tuple[ShardTask, ...], int]
):  # fmt: skip
    seeded = [replace(m, variants=tuple(replace(v, seed=seed) for v in m.variants)) for m in merges]
    return make_tasks(seeded, Limits(mem, workers, shard))[:2]


@given(MERGES, st.integers(1, 3000))
def test_every_tensor_is_in_one_shard_in_order_and_within_the_size(merges: list[TensorMerge], size: int) -> None:
    tasks, _ = plan(merges, shard=size)
    in_shards = [sorted(task.merges, key=lambda merge: natural_key(merge.name)) for task in tasks]
    assert [merge for shard in in_shards for merge in shard] == merges
    for shard in in_shards:
        assert len(shard) == 1 or sum(merge.nbytes for merge in shard) <= size
    for one, other in pairwise(in_shards):
        assert sum(merge.nbytes for merge in one) + other[0].nbytes > size, "no shard is smaller than it needs to be"


@given(MERGES, st.integers(1, 3000))
def test_headers_are_what_both_parsers_read(merges: list[TensorMerge], size: int) -> None:
    tasks, _ = plan(merges, shard=size)
    for task in tasks:
        header = task.outputs[0].header
        content = header + bytes(task.nbytes - len(header))
        entries = parse_header(header, StoredFile("x", task.nbytes, ""))
        assert {e.name: (e.dtype, e.shape) for e in entries} == {m.name: (m.out_dtype, m.shape) for m in task.merges}
        assert [e.start for e in entries if e.start < e.stop] == [
            len(header) + sum(m.nbytes for m in task.merges[:k]) for k, m in enumerate(task.merges) if m.nbytes
        ]
        for entry in entries:
            assert entry.start % {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}[entry.dtype] == 0
        found = {name: (str(x.dtype), tuple(x.shape)) for name, x in load(content).items()}
        assert found == {m.name: (f"torch.{DTYPES[m.out_dtype].torch_name}", m.shape) for m in task.merges}


@given(MERGES, st.integers(1, 3000))
def test_files_are_numbered_to_the_end(merges: list[TensorMerge], size: int) -> None:
    tasks, _ = plan(merges, shard=size)
    files = [task.file for task in tasks]
    assert files == shard_names(len(tasks)) == sorted(files)
    if len(files) > 1:
        assert files == [f"model-{k:05d}-of-{len(files):05d}.safetensors" for k in range(1, len(files) + 1)]


@given(st.lists(st.integers(0, 50), max_size=20), st.integers(1, 100))
def test_splitting_loses_nothing(sizes: list[int], limit: int) -> None:
    merges = [make_merge(f"w{k}", size) for k, size in enumerate(sizes)]
    shards = list(split_shards(merges, limit))
    assert [merge for shard in shards for merge in shard] == merges
    assert all(shards)


@pytest.mark.parametrize(("size", "expected"), [(599, [2, 1]), (600, [3]), (200, [1, 1, 1]), (1, [1, 1, 1])])
def test_a_shard_may_be_exactly_as_large_as_allowed(size: int, expected: list[int]) -> None:
    merges = [make_merge(f"w{k}", 100) for k in range(3)]
    assert [len(shard) for shard in split_shards(merges, size)] == expected


@given(MERGES, st.integers(1, 3000))
def test_bytes_to_read_and_write_are_the_sums(merges: list[TensorMerge], size: int) -> None:
    tasks, _ = plan(merges, shard=size)
    assert sum(task.read_nbytes for task in tasks) == sum(source.nbytes for m in merges for source in m.sources)
    assert sum(task.nbytes - len(task.outputs[0].header) for task in tasks) == sum(merge.nbytes for merge in merges)
    assert all(task.reread_nbytes == 0 for task in tasks)


@settings(deadline=None, max_examples=60)
@given(LARGE, st.integers(1, 512), st.integers(1, 16), st.integers(10**5, 10**9))
def test_memory_stays_within_what_is_allowed(merges: list[TensorMerge], mem: int, workers: int, size: int) -> None:
    try:
        tasks, num_workers = plan(merges, mem=mem * 2**20, workers=workers, shard=size)
    except MemoryLimitError as error:
        stated = re.search(r"--memory (\w+)$", str(error))
        assert stated is not None
        limit = parse_nbytes(stated[1])
        assert limit > mem * 2**20
        assert plan(merges, mem=limit, workers=workers, shard=size)[1] == 1
        with pytest.raises(MemoryLimitError):
            plan(merges, mem=limit - 2**20, workers=workers, shard=size)
        return
    assert 1 <= num_workers <= min(workers, len(tasks))
    share = mem * 2**20 // num_workers
    names_nbytes = TENSOR_NBYTES * max(len(task.merges) for task in tasks)
    for task in tasks:
        demands = [measure_demand(merge) for merge in task.merges]
        assert task.projected_mem == project_mem(demands, task.buffer_nbytes, Transfer(nbytes=names_nbytes))
        assert task.num_shares == 1 or not task.keeps_buffers
        assert task.num_shares <= num_workers
        assert task.projected_mem <= task.num_shares * share or task.num_shares == num_workers
        assert task.projected_mem <= mem * 2**20
        assert task.buffer_nbytes >= max(demand.block_nbytes for demand in demands)


def test_workers_are_given_up_before_the_merge_is() -> None:
    merges = [make_merge(f"w{k}", 2**20, dtypes=("BF16",) * 40) for k in range(4)]
    found = [plan(merges, mem=mem * 2**20, workers=4, shard=1)[1] for mem in (30, 60, 90, 1000)]
    assert found == sorted(found)
    assert (found[0], found[-1]) == (1, 4)


def test_more_memory_than_is_useful_is_not_taken() -> None:
    (task,), _ = plan([make_merge(num_elements=2**28)], mem=2**40)
    assert task.projected_mem <= MAX_FETCH_NBYTES + 2**24


def test_a_tensor_too_large_for_the_memory_is_planned_to_be_read_again() -> None:
    merge = make_merge(num_elements=2**26, op="slerp", parameters={"t": 0.5})
    (task,), _ = plan([merge], mem=2**28)
    assert task.read_nbytes == task.reread_nbytes == 2 * 2 * 2**26
    (task,), _ = plan([merge])
    assert (task.read_nbytes, task.reread_nbytes) == (2 * 2 * 2**26, 0)


@pytest.mark.parametrize(
    ("total", "num_shards"), [(1, 1), (10**6, 1), (10**9, 8), (15 * 10**9, 48), (140 * 10**9, 211), (1340 * 10**9, 950)]
)
def test_default_shards(total: int, num_shards: int) -> None:
    assert math.ceil(total / default_shard_nbytes(total)) == num_shards


@given(st.integers(0, 10**13), st.integers(0, 10**13))
def test_larger_outputs_have_no_smaller_shards(one: int, other: int) -> None:
    assert (default_shard_nbytes(one) <= default_shard_nbytes(other)) or one > other


def test_the_default_depends_on_the_output_alone() -> None:
    merges = [make_merge(f"w{k}", 10**7) for k in range(10)]
    names = {tuple(t.file for t in plan(merges, mem=mem, workers=n)[0]) for mem in (2**27, 2**34) for n in (1, 9)}
    assert len(names) == 1


def moved(merge: TensorMerge, **changes: object) -> TensorMerge:
    """The same merge from other files."""
    sources = tuple(
        replace(stored, file=replace(stored.file, **changes))  # type: ignore[arg-type]
        for source in merge.sources
        for stored in source.origins
    )
    return dataclasses.replace(merge, sources=sources)


def test_the_fingerprint_does_not_know_of_memory_workers_and_directories() -> None:
    merges = [make_merge(f"w{k}", 10**6, op="slerp", parameters={"t": 0.5}) for k in range(5)]
    elsewhere = [moved(merge, url="/somewhere/else/model.safetensors") for merge in merges]
    prints = {
        make_fingerprint(plan(inputs, mem=mem, workers=workers)[0], ())
        for inputs in (merges, elsewhere)
        for mem in (2**24, 2**25, 2**33)
        for workers in (1, 2, 5)
    }
    assert len(prints) == 1


def test_the_fingerprint_knows_everything_else() -> None:
    merges = [make_merge(f"w{k}", 1000) for k in range(3)]
    first = merges[0]
    (source,) = first.sources[0].origins

    def changed(**changes: object) -> list[TensorMerge]:
        return [dataclasses.replace(first, **changes), *merges[1:]]  # type: ignore[arg-type]

    def with_parameters(op: str, **parameters: object) -> list[TensorMerge]:
        return changed(op=op, variants=(make_variant(op, parameters),))

    prints = [
        make_fingerprint(plan(inputs, shard=shard, seed=seed)[0], [Written(CONFIG, config)])
        for inputs, shard, seed, config in (
            (merges, None, 0, "{}"),
            (merges, None, 1, "{}"),
            (merges, None, 0, "{ }"),
            (merges, 2000, 0, "{}"),
            (merges[:2], None, 0, "{}"),
            (
                changed(variants=(make_variant("linear", {"weight": (1.0, 1.0000001), "normalize": True}),)),
                None,
                0,
                "{}",
            ),
            (with_parameters("linear", weight=(1.0, 1.0), normalize=False), None, 0, "{}"),
            (with_parameters("passthrough", scale=(1.0, 1.0)), None, 0, "{}"),
            (changed(name="v0"), None, 0, "{}"),
            (changed(shape=(10, 100)), None, 0, "{}"),
            (changed(out_dtype="F16", written_dtype="F16"), None, 0, "{}"),
            (changed(sources=first.sources[::-1]), None, 0, "{}"),
            (changed(sources=(dataclasses.replace(source, start=2, stop=2002), first.sources[1])), None, 0, "{}"),
            ([moved(first, etag="another"), *merges[1:]], None, 0, "{}"),
            ([moved(first, nbytes=2**40), *merges[1:]], None, 0, "{}"),
            ([moved(first, url="/m0/model-2.safetensors"), *merges[1:]], None, 0, "{}"),
        )
    ]
    assert len(set(prints)) == len(prints)


@given(MERGES)
def test_tasks_survive_pickling(merges: list[TensorMerge]) -> None:
    tasks, _ = plan(merges)
    assert pickle.loads(pickle.dumps(tasks)) == tasks


def test_workers_that_share_a_gpu_divide_its_memory() -> None:
    merges = [make_merge(f"w{k}", 10**7) for k in range(8)]
    limits = Limits(2**36, 8, 1)
    on_cpu, _, _ = make_tasks(merges, limits)
    assert {task.projected_gpu_mem for task in on_cpu} == {0}
    for num_gpus, gpu_mem, expected in ((1, 648 * 2**20, 3), (1, 2**30, 8), (2, 648 * 2**20, 6)):
        tasks, num_workers, _ = make_tasks(merges, replace(limits, gpus=Gpus(num_gpus, gpu_mem)))
        assert num_workers == expected
        sharing = -(-num_workers // num_gpus)
        assert all(0 < task.projected_gpu_mem <= (gpu_mem - CONTEXT_NBYTES) // sharing for task in tasks)
        assert make_fingerprint(tasks, ()) == make_fingerprint(on_cpu, ())


@pytest.mark.parametrize(
    ("sizes", "workers", "mem", "num_threads"),
    [
        ([1] * 8, 8, 8192, [1] * 8),
        ([1] * 8, 1, 8192, [1] * 8),
        ([10] * 7 + [8], 8, 8192, [1] * 8),
        ([9, 1, 1, 1], 4, 8192, [3, 1, 1, 1]),
        ([9, 1, 1, 1], 1, 8192, [1] * 4),
        ([1], 16, 8192, [4]),
        ([1] * 8, 8, 60, [2] * 8),
    ],
    ids=[
        "alike",
        "alike, one worker",
        "nearly alike",
        "a large one",
        "a large one, one worker",
        "alone",
        "memory for half of them",
    ],
)
def test_idle_cores_help_with_large_shards(sizes: list[int], workers: int, mem: int, num_threads: list[int]) -> None:
    merges = [make_merge(f"w{k}", size * 2**20, dtypes=("BF16",) * 3) for k, size in enumerate(sizes)]
    tasks, _ = plan(merges, mem=mem * 2**20, workers=workers, shard=1)
    assert [task.num_threads for task in tasks] == num_threads
