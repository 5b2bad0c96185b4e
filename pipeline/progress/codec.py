"""Events as lines of JSON, in which they travel from where a merge runs."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.plan.results import MergeReport, ShardResult
from raymerge.pipeline.progress.events import (
    Event,
    Held,
    MergeFailed,
    Planned,
    Progressed,
    Resumed,
    Retried,
    SweepDone,
    SweepPlanned,
    Warned,
)
from raymerge.pipeline.redact import redact_texts

_NAMES: dict[type[Event], str] = {
    Planned: "planned",
    Held: "waiting",
    Resumed: "resumed",
    Progressed: "progress",
    ShardResult: "shard",
    Retried: "retry",
    Warned: "warning",
    MergeReport: "done",
    MergeFailed: "error",
    SweepPlanned: "sweep",
    SweepDone: "swept",
}
_TYPES = {name: kind for kind, name in _NAMES.items()}


_LOCAL = ("plan", "figures")
"""Fields that stay where the merge runs: they would make lines of megabytes."""


def format_event(event: Event) -> str:
    """Return an event as a line of JSON, with its name and the time."""
    now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    name = _NAMES[type(event)]
    if isinstance(event, Planned):
        event = replace(event, plan=None)
    return json.dumps(redact_texts({"event": name, "time": now, **asdict(event, dict_factory=_leave_out_local)}))


def read_event(line: str) -> Event | None:
    """Return the event that a line tells of, whoever wrote it; None if it is something else."""
    try:
        content = parse_json(line)
        event: Event = decode(content, _TYPES[content["event"]])
    except (ValueError, TypeError, KeyError):
        return None
    return event


def _leave_out_local(items: list[tuple[str, Any]]) -> dict[str, Any]:
    return {name: value for name, value in items if name not in _LOCAL}
