"""What is told of a merge while it runs: plain events, and the lines of JSON that they travel in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from datetime import UTC, datetime
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from raymerge.pipeline.plan.types import MergeReport, ShardResult
from raymerge.pipeline.redact import redact

_MAX_NUMBER = 2**63
"""Larger ones are not ours."""


@dataclass(frozen=True, slots=True)
class Planned:
    """The plan is made."""

    method: str
    models: tuple[str, ...]
    num_tensors: int
    num_shards: int
    read_nbytes: int
    """To be read, rereads included."""
    write_nbytes: int
    """To be written."""
    fingerprint: str
    """Hash of everything that decides the output's bytes."""
    text: str
    """The plan for people."""


@dataclass(frozen=True, slots=True)
class Held:
    """Another run is writing to the output, and is waited for."""

    text: str


@dataclass(frozen=True, slots=True)
class Resumed:
    """What an earlier run has finished is known, and the work begins."""

    num_shards: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Progressed:
    """How far it is."""

    num_finished: int
    """Shards, those of an earlier run included."""
    num_shards: int
    read_nbytes: int
    """Read by this run so far."""
    to_read_nbytes: int
    """To be read by this run in all."""
    written_nbytes: int
    """Of the output, what an earlier run wrote included."""
    to_write_nbytes: int
    """Of the output in all."""
    read_per_second: float
    """Bytes, over the last half minute."""
    written_per_second: float
    """Bytes, over the last half minute."""
    seconds_left: float | None
    """At this speed; None where nothing moves, or hardly anything has yet."""
    num_retries: int
    """What has been got over so far."""


@dataclass(frozen=True, slots=True)
class Retried:
    """Something went wrong and was done again."""

    reason: str
    count: int
    """How often, since this was last told."""


@dataclass(frozen=True, slots=True)
class Warned:
    """Something is doubtful."""

    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The merge has ended without a model."""

    type: str
    """The error's."""
    message: str
    exit_code: int

    @property
    def text(self) -> str:
        """For people."""
        return f"Error: {self.message}" if self.exit_code == 2 else self.message


Event = Planned | Held | Resumed | Progressed | ShardResult | Retried | Warned | MergeReport | Failed
"""In this order, more or less; `MergeReport` or `Failed` is the last."""

_NAMES: dict[type[Event], str] = {
    Planned: "planned",
    Held: "waiting",
    Resumed: "resumed",
    Progressed: "progress",
    ShardResult: "shard",
    Retried: "retry",
    Warned: "warning",
    MergeReport: "done",
    Failed: "error",
}
_TYPES = {name: kind for kind, name in _NAMES.items()}


def format_event(event: Event) -> str:
    """Return an event as a line of JSON, with its name and the time."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    return redact(
        json.dumps({"event": _NAMES[type(event)], "time": now, **asdict(event, dict_factory=_without_figures)})
    )


def _without_figures(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a part of an event; figures of every tensor would make lines of megabytes."""
    return {name: value for name, value in items if name != "figures"}


def read_event(line: str) -> Event | None:
    """Return the event that a line tells of, whoever wrote it; None if it is something else."""
    try:
        content = json.loads(line)
        event: Event = _decode(content, _TYPES[content["event"]])
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return event


def _decode(value: Any, kind: Any) -> Any:
    """Return a value as JSON has it as one of a type.

    Raises:
        TypeError: it is none, or out of reason.
        KeyError: a field is missing.
    """
    if is_dataclass(kind) and isinstance(kind, type):
        hints = get_type_hints(kind)
        return kind(
            **{
                field.name: _decode(value[field.name], hints[field.name])
                for field in fields(kind)
                if field.name != "figures"
            }
        )
    if isinstance(kind, UnionType):
        wanted, _ = get_args(kind)
        return None if value is None else _decode(value, wanted)
    if get_origin(kind) is tuple:
        kinds = get_args(kind)
        if type(value) is list:
            kinds = kinds[:1] * len(value) if kinds[-1] is Ellipsis else kinds
            return tuple(_decode(item, wanted) for item, wanted in zip(value, kinds, strict=True))
    if type(value) in (int, float) and not abs(value) < _MAX_NUMBER:
        raise TypeError("out of reason")
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise TypeError(f"{value!r} is given, {kind} is needed")
    return value
