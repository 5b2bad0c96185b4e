"""What tests watch merges with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from raymerge import Event, MergePlan, OnEvent, Planned, ShardResult

E = TypeVar("E", bound=Event)


def on(kind: type[E], act: Callable[[E], object]) -> OnEvent:
    """Do something at every event of one kind."""

    def tell(event: Event) -> None:
        if isinstance(event, kind):
            act(event)

    return tell


def stop_after(number: int, error: BaseException | None = None) -> OnEvent:
    """End a merge after some shards, as a crash of the driver would."""
    left = number

    def count(_: ShardResult) -> None:
        nonlocal left
        left -= 1
        if not left:
            raise error or RuntimeError("the driver broke")

    return on(ShardResult, count)


def list_recorded(out: Path) -> list[Path]:
    """Return the shards of an unfinished output that its journal has."""
    shards = (out / record.stem for record in (out / ".raymerge").glob("*.safetensors.json"))
    return [shard for shard in shards if shard.exists()]


class Keep:
    """Keeps every event, and the plan."""

    plan: MergePlan

    def __init__(self) -> None:
        self.events: list[Event] = []

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if isinstance(event, Planned):
            assert event.plan is not None
            self.plan = event.plan

    def list(self, kind: type[E]) -> list[E]:
        """Return the events of one kind."""
        return [event for event in self.events if isinstance(event, kind)]
