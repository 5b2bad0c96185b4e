"""What an attempt asks of nodes that are not alike."""

from __future__ import annotations

import pytest

from raymerge.cluster.ray.attempt import Attempt, has_room
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import RESERVED_MEM, Node
from raymerge.cluster.runner import Resources

GIB = 2**30
NODES = (Node("fast", 16, 8 * GIB), Node("large", 4, 64 * GIB))


@pytest.mark.parametrize(("mem_nbytes", "num_cpus"), [(GIB, 8), (10 * GIB, 4), (100 * GIB, 1)])
def test_processors_are_those_of_a_node_with_the_memory(mem_nbytes: int, num_cpus: int) -> None:
    attempt = RayRunner(20)._ask(0, Resources(mem_nbytes - RESERVED_MEM, cost=1, num_slots=8), NODES)
    assert attempt == Attempt(0, mem_nbytes, 8, num_cpus, heard_at=attempt.heard_at)
    assert any(has_room(node, attempt) for node in NODES) is (mem_nbytes <= 64 * GIB)
