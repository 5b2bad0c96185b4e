"""What an attempt asks of nodes that are not alike."""

from __future__ import annotations

import pytest

from raymerge.cluster.ray import runner
from raymerge.cluster.ray.attempt import Attempt, has_room
from raymerge.cluster.ray.runner import RayRunner
from raymerge.cluster.ray.session import Node

GIB = 2**30
NODES = (Node("fast", 16, 8 * GIB), Node("large", 4, 64 * GIB))


@pytest.mark.parametrize(("mem_nbytes", "num_cpus"), [(GIB, 8), (10 * GIB, 4), (100 * GIB, 1)])
def test_processors_are_those_of_a_node_with_the_memory(
    mem_nbytes: int, num_cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "list_nodes", lambda: NODES)
    attempt = Attempt(0, mem_nbytes, num_slots=8)
    attempt.num_cpus = RayRunner(20)._count_cpus(attempt)
    assert attempt.num_cpus == num_cpus
    assert any(has_room(node, attempt) for node in NODES) is (mem_nbytes <= 64 * GIB)
