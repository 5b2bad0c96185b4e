"""An attempt at an item on Ray: what it asks for, where it may run, and how it goes."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from ray.util.scheduling_strategies import NodeLabelSchedulingStrategy, NotIn

from raymerge.cluster.ray.session import Node
from raymerge.cluster.ray.task import Begun
from raymerge.cluster.runner import Progress


@dataclass(slots=True)
class Attempt:
    """An item in work, or to be; how `RayRunner` keeps its books."""

    item: int
    """Its position."""
    mem_nbytes: int
    """Memory requested from Ray."""
    num_slots: int = 1
    """Slots of the runner that it takes up."""
    num_cpus: int = 1
    """Processors requested from Ray: those of its slots, which keep others out of the memory that it takes."""
    number: int = 1
    avoided: tuple[str, ...] = ()
    """Nodes on which earlier attempts failed."""
    elsewhere: bool = False
    """Whether it waits for another node than those."""
    begun: Begun | None = None
    """Node and process that run it; None before it has begun."""
    heard_at: float = field(default_factory=time.monotonic)
    """When there was something from it last."""
    told: Progress = field(default_factory=Progress)
    """Progress that it has reported, which is taken back if it is done again."""


def has_room(node: Node, attempt: Attempt) -> bool:
    """Tell whether a node that does nothing else can run an attempt."""
    return node.mem_nbytes >= attempt.mem_nbytes and node.num_cpus >= attempt.num_cpus


def choose_node(attempt: Attempt) -> Any:
    """Return Ray's strategy: another node than before where the attempt waits for one, else all nodes in turn."""
    if not attempt.avoided:
        return "SPREAD"
    wanted: Any = {"ray.io/node-id": NotIn(*attempt.avoided)}
    # a mere preference passes over a node that looks full, as one does for a while after a task's end
    return NodeLabelSchedulingStrategy(wanted) if attempt.elsewhere else NodeLabelSchedulingStrategy({}, soft=wanted)
