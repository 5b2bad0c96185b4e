from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.ops.kernel import BLOCK_ELEMENTS, Site
from raymerge.ops.stored import PIECE_ELEMENTS, STRIP
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.memory.projection import (
    MAX_FETCH_NBYTES,
    WORKER_NBYTES,
    Demand,
    Transfer,
    check_fits,
    choose_buffer_nbytes,
    measure_demand,
    project_mem,
)
from raymerge.pipeline.sizes import parse_nbytes
from raymerge.pipeline.stores.files import aligned
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES
from tests.pipeline.plan.layouts import DEMANDS, TRANSFERS, make_merge, make_variant, named


def test_a_demand_is_one_block_of_every_source_and_the_scratch_that_the_kernel_declares() -> None:
    merge = make_merge(num_elements=10**7, dtypes=("BF16", "F32", "F64"))
    demand = measure_demand(merge)
    kernel = merge.variants[0].kernel
    site = Site(merge.name, merge.shape, 3, 0)
    assert demand.block_elements == kernel.grid(site) == BLOCK_ELEMENTS
    assert demand.num_passes == kernel.num_passes(site)
    assert demand.block_nbytes == (2 + 4 + 8) * BLOCK_ELEMENTS
    assert demand.scratch_nbytes == (1 + kernel.num_scratch(site)) * BLOCK_ELEMENTS * 4


def test_a_tensor_smaller_than_a_block_needs_only_its_size() -> None:
    demand = measure_demand(make_merge(num_elements=100))
    assert demand.block_nbytes == 2 * aligned(200) == 2 * 256
    assert demand.scratch_nbytes == 2 * 100 * 4


def test_what_a_kernel_keeps_is_counted_besides_its_scratch() -> None:
    parameters: dict[str, Any] = {
        "weight": (1.0,),
        "density": (0.5,),
        "normalize": True,
        "rescale": False,
        "lambda": 1.0,
    }
    merge = make_merge(num_elements=10**7, op="ties", parameters=parameters)
    demand = measure_demand(merge)
    site = Site(merge.name, merge.shape, 2, 0)
    assert demand.state_nbytes == merge.variants[0].kernel.state_nbytes(site) > 0
    besides = 2 * OUTPUT_BUFFER_NBYTES + WORKER_NBYTES
    assert project_mem([demand], 0, Transfer()) == demand.scratch_nbytes + demand.state_nbytes + besides


@pytest.mark.parametrize("num_elements", [0, 1])
def test_empty_tensors_and_scalars(num_elements: int) -> None:
    demand = measure_demand(make_merge(num_elements=num_elements))
    assert demand.block_nbytes == 2 * 64 * num_elements


@pytest.mark.parametrize("num_sources", [1, 3])
def test_copies_are_made_and_compared_byte_by_byte(num_sources: int) -> None:
    dtypes = ("I64",) * num_sources
    demand = measure_demand(make_merge(op="copy", parameters={}, dtypes=dtypes, out_dtype="I64", num_elements=2**30))
    assert (demand.num_passes, demand.block_nbytes) == (0, num_sources * BLOCK_ELEMENTS)
    assert demand.scratch_nbytes == min(2, num_sources) * BLOCK_ELEMENTS


def test_several_outputs_share_scratch_and_decoded_sources() -> None:
    merge = make_merge(num_elements=10**7)
    single = measure_demand(merge)
    weights = [(1.0, weight) for weight in (1.0, 2.0, 3.0)]
    variants = tuple(make_variant("linear", {"weight": weight, "normalize": True}) for weight in weights)
    several = measure_demand(replace(merge, variants=variants))
    assert several.scratch_nbytes == single.scratch_nbytes + 2 * BLOCK_ELEMENTS * 4
    one, three = (project_mem([single], 0, Transfer(num_outputs=count)) for count in (1, 3))
    squares = 4 * STRIP * (2 + OUTPUT_BUFFER_NBYTES // (2 * PIECE_ELEMENTS))
    assert three == one + 2 * (2 * OUTPUT_BUFFER_NBYTES + squares)


@pytest.mark.parametrize(("states", "most"), [((5, 5), 5), ((5, 0), 5), ((5, 3), 8), ((2**30, 2**29), 2**30 + 2**24)])
def test_tables_that_tensors_leave_are_there_while_others_are_merged(states: tuple[int, ...], most: int) -> None:
    demands = [replace(measure_demand(make_merge(num_elements=100)), state_nbytes=nbytes) for nbytes in states]
    bare = project_mem([replace(demands[0], state_nbytes=0)], 0, Transfer())
    assert project_mem(demands, 0, Transfer()) == bare + most


@given(st.integers(0, 2**40))
def test_alignment(nbytes: int) -> None:
    assert aligned(nbytes) % 64 == 0
    assert nbytes <= aligned(nbytes) < nbytes + 64


@given(DEMANDS, st.integers(2**20, 2**31), TRANSFERS)
def test_a_chosen_buffer_keeps_within_the_memory_and_holds_a_block(
    demands: list[Demand], mem: int, transfer: Transfer
) -> None:
    buffer_nbytes = choose_buffer_nbytes(demands, mem, transfer)
    largest_block = max(demand.block_nbytes for demand in demands)
    assert project_mem(demands, buffer_nbytes, transfer) <= mem
    kept = {demand.kept_nbytes for demand in demands}
    assert buffer_nbytes <= max(MAX_FETCH_NBYTES, largest_block) or buffer_nbytes in kept
    room = (mem - project_mem(demands, 0, transfer)) // transfer.num_buffers
    assert all(nbytes <= buffer_nbytes or nbytes > room for nbytes in kept if nbytes)
    fits = project_mem(demands, largest_block, transfer) <= mem
    assert (buffer_nbytes >= largest_block) is fits


def test_a_block_of_many_models_gets_its_room() -> None:
    merge = make_merge(num_elements=10**9, dtypes=("BF16",) * 300)
    demand = measure_demand(merge)
    assert demand.block_nbytes > MAX_FETCH_NBYTES
    assert choose_buffer_nbytes([demand], 2**40, Transfer()) == demand.block_nbytes


def test_two_buffers_and_what_storages_take_are_counted() -> None:
    demand = measure_demand(make_merge(num_elements=10**7))
    alone, both = (project_mem([demand], 10**6, transfer) for transfer in (Transfer(), Transfer(2, 10**5)))
    assert both == alone + 10**6 + 10**5


@given(DEMANDS, st.integers(0, 2**20 - 1), TRANSFERS)
def test_the_stated_limit_works_and_one_mebibyte_less_does_not(
    demands: list[Demand], allowed_mem: int, transfer: Transfer
) -> None:
    with pytest.raises(MemoryLimitError) as caught:
        check_fits(named(demands), allowed_mem, transfer)
    stated = re.search(r"--memory (\w+)$", str(caught.value))
    assert stated is not None
    limit = parse_nbytes(stated[1])
    check_fits(named(demands), limit, transfer)
    with pytest.raises(MemoryLimitError):
        check_fits(named(demands), limit - 2**20, transfer)


def test_the_message_names_the_tensor_and_both_figures() -> None:
    small, large = (
        Demand(2**16, 9, 0, 2**20, 2**20, 0, 2**17, 0),
        Demand(2**16, 9, 1, 2**24, 2**23, 2**21, 2**17, 9 * 2**24),
    )
    needed = (2**24 + 2**23 + 2**21 + 2 * OUTPUT_BUFFER_NBYTES + WORKER_NBYTES) // 2**20
    with pytest.raises(MemoryLimitError) as caught:
        check_fits({"one": small, "two": large, "three": small}, 20 * 2**20, Transfer())
    assert str(caught.value) == (
        f"two needs {needed}MiB for one block of each source with scratch and output buffers, and 20MiB are allowed; "
        f"the smallest limit that works is --memory {needed}MiB"
    )
