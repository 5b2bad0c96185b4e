"""Items that wait for a runner's slots."""

from __future__ import annotations

from collections.abc import Sequence

from raymerge.cluster.runner import Resources


class Waiting:
    """Items of a run in the order in which they start: those of most slots first, then the costliest.

    An item that does not fit into the slots that are free is passed over: those of more slots have started before it,
    and where one of them ends, there is room for the next.
    """

    def __init__(self, resources: Sequence[Resources], num_slots: int) -> None:
        """Have all items wait, by their positions.

        Args:
            resources: of each item; one that asks for more slots than there are gets all of them.
            num_slots: of the runner.
        """
        self._slots = [min(item.num_slots, num_slots) for item in resources]
        self._items = order_items(resources)
        self._num_free = num_slots

    def __bool__(self) -> bool:
        """Return whether an item waits."""
        return bool(self._items)

    def take(self) -> int | None:
        """Return the item that starts next and has its slots from now on; None where none fits."""
        for place, item in enumerate(self._items):
            if self._slots[item] <= self._num_free:
                del self._items[place]
                self._num_free -= self._slots[item]
                return item
        return None

    @property
    def has_spare(self) -> bool:
        """Whether there is a free slot that no item waits for."""
        return not self._items and self._num_free > 0

    def take_twice(self, item: int) -> bool:
        """Take the slots of an item in work once more, for a twin; return False where others need them."""
        if self._items or self._slots[item] > self._num_free:
            return False
        self._num_free -= self._slots[item]
        return True

    def release(self, item: int) -> None:
        """Free the slots of an item that has ended, or of one of its twins."""
        self._num_free += self._slots[item]

    def repeat(self, item: int) -> None:
        """Have a released item wait again, before all others."""
        self._items.insert(0, item)

    def clear(self) -> None:
        """Have no item wait any more."""
        self._items.clear()


def order_items(resources: Sequence[Resources]) -> list[int]:
    """Return the positions of items in the order in which they start.

    >>> order_items([Resources(0, cost=1), Resources(0, cost=3), Resources(0, cost=2, num_slots=2)])
    [2, 1, 0]
    """
    return sorted(range(len(resources)), key=lambda k: (-resources[k].num_slots, -resources[k].cost, k))
