"""Campaigns of mutated input: what is not accepted must be refused by an error of ours, and in time."""

from __future__ import annotations

import signal
import traceback
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from types import FrameType
from typing import Generic, TypeVar

from raymerge import RaymergeError
from raymerge.pipeline.cli.console import printable
from raymerge.pipeline.cli.exits import explain

Case = TypeVar("Case")

CPU_SECONDS, SECONDS = 10, 60
"""Longest that one case may take: of this process's time, and of anybody's, for other processes may be busy."""
_MOST_FAULTS = 20
"""So many are kept with what they are; the others are counted."""


class Campaign(ABC, Generic[Case]):
    """One kind of input."""

    @abstractmethod
    def make(self, random: Random) -> Case:
        """Return an input, mutated or not."""

    @abstractmethod
    def attempt(self, case: Case) -> None:
        """Use an input as users do; refusals are raised."""

    @abstractmethod
    def explain_refusal(self, case: Case) -> str:
        """Return why the reference refuses an input that was accepted; empty where it does not."""

    def close(self) -> None:
        """Give back what the campaign took."""


class Hang(BaseException):
    """A case takes too long."""


@dataclass
class Counts:
    """Outcomes of a campaign."""

    accepted: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    """By the name of the error."""
    tracebacks: int = 0
    hangs: int = 0
    wrongly_accepted: int = 0
    """What the reference refuses."""
    faults: list[str] = field(default_factory=list)

    def note(self, fault: str) -> None:
        if len(self.faults) < _MOST_FAULTS:
            self.faults.append(fault)

    def __str__(self) -> str:
        refused = ", ".join(f"{name} {number:,}" for name, number in self.refused.most_common())
        return (
            f"{self.accepted:,} accepted; {self.refused.total():,} refused ({refused});"
            f" {self.tracebacks} tracebacks; {self.hangs} hangs; {self.wrongly_accepted} accepted that the reference"
            " refuses"
        )


def run_campaign(campaign: Campaign[Case], numbers: range, seed: int) -> Counts:
    """Try the cases with these numbers; each depends on the seed and its number alone."""
    counts = Counts()
    for number in numbers:
        case = campaign.make(Random(f"{seed} {number}"))
        _try(campaign, case, f"case {number}: {case!r:.600}", counts)
    return counts


def _try(campaign: Campaign[Case], case: Case, name: str, counts: Counts) -> None:
    try:
        with limit_time():
            campaign.attempt(case)
    except RaymergeError as error:
        counts.refused[type(error).__name__] += 1
        if not _is_readable(error):
            counts.tracebacks += 1
            counts.note(f"{name}\nnot readable: {error!r:.2000}")
    except Hang:
        counts.hangs += 1
        counts.note(f"{name}\nhang: {traceback.format_exc()[-2000:]}")
    except Exception:
        counts.tracebacks += 1
        counts.note(f"{name}\n{traceback.format_exc()[-2000:]}")
    else:
        counts.accepted += 1
        if why := campaign.explain_refusal(case):
            counts.wrongly_accepted += 1
            counts.note(f"{name}\nthe reference refuses it: {why:.300}")


def _is_readable(error: RaymergeError) -> bool:
    """Tell whether the command line can print an error, at a length that somebody reads, with exit code 2."""
    told = explain(error)
    text = printable(told.text)
    text.encode()
    return told.exit_code == 2 and bool(text.strip()) and len(text) < 20_000 and "Traceback" not in text


@contextmanager
def limit_time() -> Iterator[None]:
    """Raise Hang where this block takes too long, in the main thread."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = [(number, signal.signal(number, stop)) for number in (signal.SIGALRM, signal.SIGPROF)]
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_REAL, signal.ITIMER_PROF):
            signal.setitimer(timer, 0)
        for number, handler in before:
            signal.signal(number, handler)


def write(path: Path, content: bytes) -> None:
    """Write a file, in place of an earlier one that plans may still have open."""
    path.unlink(missing_ok=True)
    path.write_bytes(content)
