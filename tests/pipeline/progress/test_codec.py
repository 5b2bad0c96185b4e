"""Events travel as lines of JSON, and lines that others wrote do no harm."""

from __future__ import annotations

import dataclasses
import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.pipeline.cli.display.merge import Display
from raymerge.pipeline.progress.codec import format_event, read_event
from raymerge.pipeline.progress.events import (
    Event,
    Warned,
)
from tests.pipeline.progress.samples import EVENTS, REPORT

DOCS = (Path(__file__).parents[3] / "docs/progress.md").read_text()


@pytest.mark.parametrize("name", EVENTS)
def test_there_and_back(name: str) -> None:
    line = format_event(EVENTS[name])
    assert line.isascii()
    assert line.isprintable(), "one line, whatever is in it"
    assert read_event(line) == EVENTS[name]
    content = json.loads(line)
    assert content["event"] == name
    assert content["time"].endswith("Z")
    assert abs(datetime.fromisoformat(content["time"]) - datetime.now(UTC)) < timedelta(minutes=1)
    assert read_event(json.dumps({**content, "of a later version": 1})) == EVENTS[name]


def test_every_event_is_tested_and_documented() -> None:
    assert {type(event) for event in EVENTS.values()} == set(get_args(Event))
    for name, event in EVENTS.items():
        row = next(line for line in DOCS.splitlines() if line.startswith(f"| `{name}` |"))
        for field in json.loads(format_event(event)).keys() - {"event", "time"}:
            assert f"`{field}`" in row, (name, field)


def test_nothing_that_was_not_known_is_none() -> None:
    assert read_event(format_event(dataclasses.replace(REPORT, slowest=None))) == dataclasses.replace(
        REPORT, slowest=None
    )


def test_no_credential_is_written() -> None:
    line = format_event(Warned('AWS_SECRET_ACCESS_KEY="hidden1" and https://me:hidden2@host/a'))
    assert "hidden" not in line
    assert json.loads(line)["event"] == "warning"


@pytest.mark.parametrize(
    "line",
    [
        "",
        "null",
        "3",
        "[]",
        '"event"',
        "{}",
        "Traceback (most recent call last):",
        '{"event": "unheard of"}',
        '{"event": ["warning"], "text": "a"}',
        '{"event": "warning"}',
        '{"event": "warning", "text": 1}',
        '{"event": "warning", "text": "a"',
        '{"event": "resumed", "num_shards": true, "nbytes": 1}',
        '{"event": "resumed", "num_shards": 1.5, "nbytes": 1}',
        '{"event": "resumed", "num_shards": "1", "nbytes": 1}',
        '{"event": "resumed", "num_shards": 1, "nbytes": 1%s}' % ("0" * 400),
        format_event(EVENTS["progress"]).replace("1000000000.0", "1e999"),
        format_event(EVENTS["progress"]).replace("1000000000.0", "NaN"),
        format_event(EVENTS["progress"]).replace("1000000000.0", "1" + "0" * 400),
        format_event(REPORT).replace('died", 1', 'died"'),
        format_event(REPORT).replace("3.5", "{}"),
        "[" * 100_000,
    ],
)
def test_what_is_no_event(line: str) -> None:
    assert read_event(line) is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(deadline=None)  # other work may be going on
@given(st.sampled_from(list(EVENTS)), st.data())
def test_whatever_is_an_event_can_be_shown(name: str, data: st.DataObject) -> None:
    """Lines of a log are anybody's: with any value in place of a field's they are no event, or one that is printed."""
    content = json.loads(format_event(EVENTS[name]))
    field = data.draw(st.sampled_from(sorted(content)))
    content[field] = data.draw(JSON)
    with Display(verbose=True, quiet=False) as display:
        display.show_line(json.dumps(content))
