"""Mistakes in a config: gathered while it is read, and reported at once, each with its line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from raymerge.pipeline.config.document import Document

_MOST = 1000
"""Most mistakes that are collected; each unknown key is compared with all that are known."""


class TooManyError(Exception):
    """The rest of a document is not worth reading."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One mistake."""

    message: str
    """Begins with the YAML path."""
    line: int | None
    """From 1; None where it has none of its own: something is missing at the top level, or there is no file."""


@dataclass(frozen=True, slots=True)
class Findings:
    """The mistakes of one document."""

    errors: list[Finding] = field(default_factory=list)
    warnings: list[Finding] = field(default_factory=list)
    """Mistakes that do no harm by themselves."""
    notes: list[str] = field(default_factory=list)
    """Notes on the reading of the config where it leaves something open."""
    unknown: set[str] = field(default_factory=set)
    """Paths of keys that have no meaning: one may have been meant for a key that is missed."""

    def note(self, finding: Finding, *, is_error: bool) -> None:
        """Add a mistake, unless it is noted already.

        Raises:
            TooManyError: there are so many that this is no merge config.
        """
        noted = self.errors if is_error else self.warnings
        if finding not in noted:
            noted.append(finding)
        if len(noted) >= _MOST:
            raise TooManyError

    def list_warnings(self, document: Document) -> tuple[str, ...]:
        """Return the warnings, each with its line, and without directories: they get into the output's manifest."""
        return tuple(document.where(found.line, is_short=True) + found.message for found in _sorted(self.warnings))

    def explain(self, document: Document) -> str:
        """Return the first mistakes, errors first, in the order of the file, each with its line and the line's text."""
        errors = [(finding.message, finding.line) for finding in _sorted(self.errors)]
        paths = {finding.message.partition(": ")[0] for finding in self.errors}
        others = [warning for warning in self.warnings if warning.message.partition(": ")[0] not in paths]
        label = "warning: " if errors else ""
        warnings = [(label + finding.message, finding.line) for finding in _sorted(others)]
        return document.show_all([*errors, *warnings])


def _sorted(findings: Iterable[Finding]) -> list[Finding]:
    """Return findings in the order of the file; those without a line come last."""
    return sorted(findings, key=lambda finding: (finding.line is None, finding.line or 0))
