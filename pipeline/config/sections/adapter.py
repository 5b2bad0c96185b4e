"""The key `adapter`: LoRA adapters are merged into an adapter, and how."""

from __future__ import annotations

from dataclasses import dataclass

from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import shown, suggest

NO_UPDATE = ModelRef("(no update)")
"""The base of methods that need one: updates are differences from their base already, so its own is zero."""

_WAYS = ("updates", "factors")
_MAX_RANK = 2**16

ADAPTER_SCHEMA: dict[str, object] = {
    "description": "Models are LoRA adapters, which become one.",
    "type": ["object", "null"],
    "properties": {
        "rank": {
            "description": "The most that its factors have.",
            "type": ["integer", "null"],
            "minimum": 1,
            "maximum": _MAX_RANK,
        },
        "merge": {"description": "Products of factors, or each factor by itself.", "enum": [*_WAYS, None]},
    },
    "additionalProperties": False,
    "if": {"required": ["merge"], "properties": {"merge": {"const": "factors"}}},
    "then": {"properties": {"rank": {"type": "null"}}},
}
"""The JSON Schema of the key."""


NOT_OF_ADAPTERS = {
    "base_model": "and no base takes part in that; leave it out, or leave `adapter` out and write MODEL+ADAPTER for a"
    " model",
    "slices": "module by module; list them under `models`",
    "modules": "module by module; list them under `models`",
    "copy_rest_from": "and adapters have no rest; leave it out",
    "tokenizer": "which gets the files of the first one; leave it out",
    "tokenizer_source": "which gets the files of the first one; leave it out",
    "chat_template": "which gets the files of the first one; leave it out",
}
"""Keys that go with models alone, and what to do."""


@dataclass(frozen=True, slots=True)
class AdapterRule:
    """The `adapter` section: how adapters are merged into one."""

    rank: int | None = None
    """The most that the output's factors have; None where the inputs decide."""
    by_factors: bool = False
    """Whether each of the two factors is merged by itself, in place of their product."""


def parse_adapter(place: Place) -> AdapterRule | None:
    """Return what a config says of the adapter that it makes; None where it says nothing.

    Raises:
        PlaceError: it says something that cannot be.
    """
    if place.value is None:
        return None
    if not isinstance(place.value, dict):
        raise place.error(
            f"{shown(place.value)} is given, a mapping is needed; write `adapter: {{rank: 16}}`, or `{{}}`"
        )
    place.check_keys(("rank", "merge"))
    rank, way = place.get("rank"), place.get("merge")
    if rank.value is not None and (type(rank.value) is not int or not 0 < rank.value <= _MAX_RANK):
        raise rank.error(f"{shown(rank.value)} is given; a whole number from 1 to {_MAX_RANK:,} is needed")
    if way.value is not None and way.value not in _WAYS:
        raise way.error(f"{shown(way.value)} is given; {suggest(str(way.value), _WAYS)}")
    by_factors = way.value == "factors"
    if by_factors and rank.value is not None:
        raise rank.error("factors that are merged by themselves keep their rank; leave `rank` out, or `merge: factors`")
    return AdapterRule(rank.value, by_factors)


def find_base_of_updates(root: Place, op: Op | None) -> ModelRef | None:
    """Return the base of adapters that are merged among each other, if the method takes one; note keys of models.

    Args:
        root: a config with `adapter`.
        op: the method, if it is known.
    """
    for key, advice in NOT_OF_ADAPTERS.items():
        if (place := root.get(key)).value is not None:
            place.note(place.error(f"`adapter` makes one adapter of several, {advice}"))
    return NO_UPDATE if op is not None and op.base is Base.REQUIRED else None
