from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.ops.kernel import Site
from raymerge.ops.kernels.linear import LinearCombination
from raymerge.pipeline.checkpoint.names import natural_key
from raymerge.pipeline.plan.memory.projection import Transfer
from raymerge.pipeline.plan.memory.shares import Limits
from raymerge.pipeline.plan.schedule import explain_gpus, explain_idle, measure_cost, measure_idle, share_out
from raymerge.pipeline.plan.shards import make_tasks
from raymerge.pipeline.plan.types import Gpus, ShardTask, TensorMerge
from raymerge.pipeline.sizes import parse_nbytes
from tests.pipeline.plan.layouts import make_merge

COSTS = st.lists(st.integers(0, 1000), max_size=40)
WORKERS = st.integers(1, 12)
SLERP = {"t": 0.5}
MERGES = st.lists(st.integers(1, 400), min_size=1, max_size=60).map(
    lambda sizes: [make_merge(f"w.{k}", size * 2**22, op="slerp", parameters=SLERP) for k, size in enumerate(sizes)]
)


def plan(merges: list[TensorMerge], shard_nbytes: int) -> tuple[ShardTask, ...]:
    return make_tasks(merges, Limits(2**40, 1, shard_nbytes))[0]


def last(tasks: tuple[ShardTask, ...], num_workers: int) -> int:
    """When the last worker ends."""
    return max(share_out(map(measure_cost, tasks), num_workers))


def stated(message: str | None) -> tuple[int, int, int]:
    """The size that is named, and in percent the idle share without it and the time that it saves."""
    found = re.search(r"idle (\d+)% .* --shard-size (\w+) would take (\d+)% less time$", message or "")
    assert found is not None, message
    return parse_nbytes(found[2]), int(found[1]), int(found[3])


@given(COSTS, WORKERS)
def test_all_is_shared_out_and_the_tail_is_one_item(costs: list[int], num_workers: int) -> None:
    loads = share_out(costs, num_workers)
    assert (len(loads), sum(loads)) == (num_workers, sum(costs))
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(COSTS, WORKERS)
def test_busy_and_idle_time_are_all_the_time(costs: list[int], num_workers: int) -> None:
    loads = share_out(costs, num_workers)
    total = num_workers * max(loads)
    waiting = sum(max(loads) - load for load in loads)
    assert math.isclose(measure_idle(loads) * total, waiting, abs_tol=1e-6)


@given(COSTS, WORKERS)
def test_as_a_clock_would_have_it(costs: list[int], num_workers: int) -> None:
    waiting, busy_until = sorted(costs), [0] * num_workers
    while waiting:
        free = busy_until.index(min(busy_until))
        busy_until[free] += waiting.pop()
    assert sorted(share_out(costs, num_workers)) == sorted(busy_until)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=7), st.integers(1, 3))
def test_not_much_longer_than_the_best_order(costs: list[int], num_workers: int) -> None:
    """Source: Graham 1969, bounds on multiprocessing timing anomalies: (4/3 - 1/3m) of the optimum, largest first."""
    best = min(
        max(sum(c for c, w in zip(costs, chosen, strict=True) if w == worker) for worker in range(num_workers))
        for chosen in itertools.product(range(num_workers), repeat=len(costs))
    )
    assert best <= max(share_out(costs, num_workers)) <= best * (4 / 3 - 1 / (3 * num_workers)) + 1e-9


def test_shards_that_are_too_few() -> None:
    merges = [make_merge(f"w.{k}", 10**8) for k in range(40)]
    tasks = plan(merges, 2 * 10**9)
    assert len(tasks) == 4
    assert stated(explain_idle(tasks, 8)) == (10**9, 50, 50)


def test_shards_that_do_not_come_out_even() -> None:
    merges = [make_merge(f"w.{k}", 10**8) for k in range(45)]
    tasks = plan(merges, 10**9)
    assert len(tasks) == 9
    assert stated(explain_idle(tasks, 8)) == (7 * 10**8, 44, 40)


@settings(deadline=None, max_examples=60)
@given(MERGES, st.integers(2**26, 2**34), st.integers(1, 40))
def test_the_size_that_is_named_does_what_is_said(merges: list[TensorMerge], size: int, num_workers: int) -> None:
    merges = sorted(merges, key=lambda merge: natural_key(merge.name))
    tasks = plan(merges, size)
    message = explain_idle(tasks, num_workers)
    if message is None:
        return
    now = last(tasks, num_workers)
    assert sum(map(measure_cost, tasks)) < 0.9 * num_workers * now, "a tenth of the time is idle"
    if "--shard-size" in message:
        nbytes, _, saved = stated(message)
        then = last(plan(merges, nbytes), num_workers)
        assert saved >= 10
        assert abs(100 * (1 - then / now) - saved) < 0.51, "headers make shards a little longer"
    else:
        fewer = int(re.findall(r"(\d+) workers would be about as fast", message)[0])
        assert fewer < num_workers
        assert last(tasks, fewer) <= now / 0.9


def test_a_tensor_that_keeps_all_waiting() -> None:
    merges = [make_merge("big", 10**10), *(make_merge(f"w.{k}", 10**8) for k in range(90))]
    message = explain_idle(plan(merges, 10**9), 16)
    assert message is not None
    assert message.endswith("big alone takes one of them that long; 2 workers would be about as fast")


def test_nothing_is_said_where_nothing_is_lost() -> None:
    even = [make_merge(f"w.{k}", 10**8) for k in range(80)]
    assert explain_idle(plan(even, 10**9), 8) is None
    assert explain_idle(plan(even, 10**12), 1) is None
    small = [make_merge(f"w.{k}", 10**6) for k in range(80)]
    assert explain_idle(plan(small, 10**9), 8) is None, "a second or so"


# GPUs that are not worth their start


def plan_for_gpus(merges: list[TensorMerge]) -> tuple[ShardTask, ...]:
    return make_tasks(merges, Limits(2**40, 16, 10**9, Gpus(1, 2**37), transfer=Transfer(2)))[0]


def make_model(num_billions: int, op: str, num_sources: int, **parameters: Any) -> list[TensorMerge]:
    """Return a model of tensors with 100 million elements."""
    dtypes = ("BF16",) * num_sources
    return [make_merge(f"w.{k}", 10**8, op=op, parameters=parameters, dtypes=dtypes) for k in range(10 * num_billions)]


TIES = {"weight": (1.0,) * 3, "density": (0.5,) * 3, "normalize": True, "int8_mask": False, "lambda": 1.0}


@pytest.mark.parametrize(
    ("num_billions", "num_workers", "said"),
    [
        (3, 16, "takes 16 workers on the CPU about 2 s, and CUDA takes 5 s to start"),
        (3, 1, None),
        (1, 16, "takes 16 workers on the CPU less than a second, and"),
        (70, 16, None),
    ],
)
def test_a_gpu_is_not_worth_its_start_where_there_is_little_arithmetic(
    num_billions: int, num_workers: int, said: str | None
) -> None:
    found = explain_gpus(plan_for_gpus(make_model(num_billions, "ties", 4, **TIES)), num_workers)
    if said is None:
        assert found is None
    else:
        assert found is not None
        assert found.startswith("this would be faster without --gpu-memory: the arithmetic ")
        assert said in found


def test_a_gpu_is_never_worth_less_for_more_work() -> None:
    for op, parameters in (("slerp", SLERP), ("linear", {"weight": (1.0, 1.0), "normalize": True})):
        sizes = [n for n in (1, 10, 100) if explain_gpus(plan_for_gpus(make_model(n, op, 2, **parameters)), 4)]
        assert sizes == [1, 10, 100][: len(sizes)]


class WholeMatrix(LinearCombination):
    """Needs the whole tensor, as methods with an SVD do."""

    def grid(self, site: Site) -> int:
        return site.num_elements


def test_kernels_that_need_whole_tensors_are_left_to_the_gpu() -> None:
    merges = make_model(1, "linear", 2, weight=(1.0, 1.0), normalize=True)
    variant = replace(merges[0].variants[0], kernel=WholeMatrix((1.0, 1.0)))
    assert explain_gpus(plan_for_gpus(merges), 16) is not None
    merges[-1] = replace(merges[-1], variants=(variant,))
    assert explain_gpus(plan_for_gpus(merges), 16) is None
