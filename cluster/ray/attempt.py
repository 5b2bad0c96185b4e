"""An attempt at an item on Ray: what it asks for, where it may run, and how it goes."""

from __future__ import annotations

import math
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
    key: bytes = b""
    """Key under which it is told to stop."""
    begun: Begun | None = None
    """Node and process that run it; None before it has begun."""
    began_at: float = math.inf
    """Time at which the start was heard of."""
    heard_at: float = field(default_factory=time.monotonic)
    """Time of its last message."""
    advanced_at: float = math.inf
    """Time of the last message of bytes, or of its start: it may report for ever that it waits."""
    told: Progress = field(default_factory=Progress)
    """Progress that it has reported."""
    is_counted: bool = True
    """Whether this progress is part of the run's: not where it has a twin that began later."""
    is_beaten: bool = False
    """Whether its twin was done first, so that it is to end."""

    def begin(self, begun: Begun) -> None:
        """Take note that it has begun, as was just heard."""
        self.begun, self.began_at, self.advanced_at = begun, self.heard_at, self.heard_at

    def make_next(self) -> Attempt:
        """Return another attempt at the item, on another node than the last if there is one."""
        avoided = (*self.avoided, self.begun.node_id) if self.begun else self.avoided
        item, mem_nbytes, num_slots, num_cpus = self.item, self.mem_nbytes, self.num_slots, self.num_cpus
        return Attempt(item, mem_nbytes, num_slots, num_cpus, number=self.number, avoided=avoided)


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
