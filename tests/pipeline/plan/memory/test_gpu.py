"""What a GPU and its host hold while they merge: the sums, and what is chosen by them."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.pipeline.errors import MemoryLimitError
from raymerge.pipeline.plan.memory.gpu import (
    CONTEXT_NBYTES,
    check_fits_gpu,
    choose_room_nbytes,
    out_slot_nbytes,
    project_gpu_mem,
    project_staged_mem,
)
from raymerge.pipeline.plan.memory.projection import WORKER_NBYTES, Demand, Transfer, measure_demand
from raymerge.pipeline.sizes import parse_nbytes
from raymerge.pipeline.stores.seam import OUTPUT_BUFFER_NBYTES
from tests.pipeline.plan.layouts import DEMANDS, TRANSFERS, make_merge, named

MIB = 2**20


def test_a_gpu_holds_the_sources_and_scratch_and_results_for_a_piece() -> None:
    demand = measure_demand(make_merge(num_elements=10 * BLOCK_ELEMENTS, dtypes=("BF16", "BF16")))
    piece = 3 * BLOCK_ELEMENTS
    room = 10 * BLOCK_ELEMENTS * 2 * 2
    needed = 2 * room + 2 * (64 + 2 * piece) + 2 * 4 * piece
    assert project_gpu_mem([demand], room, 2 * 2 * piece, Transfer(2)) == needed
    assert project_gpu_mem([demand], room, 2 * 2 * piece, Transfer(1)) == needed - room
    assert project_gpu_mem([demand], room, 2 * 2 * piece, Transfer(2, num_outputs=3)) == needed + 4 * (64 + 2 * piece)
    assert out_slot_nbytes(demand, 2 * 2 * piece) == 64 + 2 * piece


def test_the_host_holds_two_small_buffers_however_large_the_tensor() -> None:
    for num_elements in (100, 10_000):
        demand = measure_demand(make_merge(num_elements=num_elements * BLOCK_ELEMENTS))
        besides = 2 * OUTPUT_BUFFER_NBYTES + WORKER_NBYTES
        expected = 2 * 10**6 + 2 * out_slot_nbytes(demand, 2**25) + besides
        assert project_staged_mem([demand], 2**25, Transfer(staging_nbytes=10**6)) == expected


def test_a_piece_is_no_larger_than_the_tensor() -> None:
    small, large = (measure_demand(make_merge(num_elements=n * BLOCK_ELEMENTS + 1)) for n in (3, 1000))
    piece_nbytes = 100 * large.block_nbytes
    assert small.of_window(small.scratch_nbytes, piece_nbytes) == 4 * small.scratch_nbytes
    assert large.of_window(large.scratch_nbytes, piece_nbytes) == 100 * large.scratch_nbytes
    assert measure_demand(make_merge(num_elements=0)).of_window(100, piece_nbytes) == 0


@given(DEMANDS, st.integers(2**20, 2**31), st.integers(2**20, 2**31), TRANSFERS)
def test_a_room_keeps_within_both_memories(demands: list[Demand], mem: int, gpu_mem: int, transfer: Transfer) -> None:
    largest = max(demand.block_nbytes for demand in demands)
    room, piece = choose_room_nbytes(demands, mem, gpu_mem, transfer)

    def fits(room: int, piece: int) -> bool:
        on_host = project_staged_mem(demands, piece, transfer)
        return on_host <= mem and project_gpu_mem(demands, room, piece, transfer) <= gpu_mem

    if fits(largest, largest):
        assert room >= piece or not fits(largest + 64, largest)
    assert room < largest or (fits(room, piece) and piece >= largest)
    if room >= largest:  # what has no room now has none with the smallest pieces that are large enough, either
        small = max(largest, 32 * MIB)
        for demand in demands:
            assert demand.kept_nbytes <= room or piece < small or not fits(demand.kept_nbytes, small)


def test_pieces_are_small_where_that_makes_room_for_a_tensor() -> None:
    demand = measure_demand(make_merge(num_elements=2**24, op="ties", dtypes=("BF16",) * 4, parameters=TIES))
    kept = demand.kept_nbytes
    for piece in (64 * MIB, 32 * MIB):
        needed = project_gpu_mem([demand], kept, piece, Transfer(2)) + 128
        assert choose_room_nbytes([demand], 2**40, needed, Transfer(2)) == (kept, piece)


TIES = {"weight": (1.0,) * 3, "density": (0.5,) * 3, "normalize": True, "int8_mask": False, "lambda": 1.0}


@given(DEMANDS, st.integers(0, CONTEXT_NBYTES - 1))
def test_the_stated_limit_of_a_gpu_works_and_one_mebibyte_less_does_not(demands: list[Demand], allowed: int) -> None:
    with pytest.raises(MemoryLimitError, match=r"^tensor\d needs \w+ on a GPU") as caught:
        check_fits_gpu(named(demands), 2**40, allowed, Transfer(2))
    stated = re.search(r"--gpu-memory (\w+)$", str(caught.value))
    assert stated is not None
    limit = parse_nbytes(stated[1])
    check_fits_gpu(named(demands), 2**40, limit, Transfer(2))
    with pytest.raises(MemoryLimitError):
        check_fits_gpu(named(demands), 2**40, limit - 2**20, Transfer(2))
