"""A place in a config: what is written there, the path that messages call it by, and its line."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TypeVar

import yaml

from raymerge.pipeline.config.findings import Finding, Findings
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import find_near, shown, suggest

_NONE: Mapping[str, str] = MappingProxyType({})

T = TypeVar("T")


class PlaceError(ConfigError):
    """Something is wrong at one place of a config."""

    line: int | None = None


@dataclass(frozen=True, slots=True)
class Place:
    """One value of the YAML; everything below it is reached through `get` and `elements`."""

    value: object
    """None where nothing is written."""
    path: str = ""
    """Such as `models[1].parameters.weight`; empty for the whole document."""
    findings: Findings = field(default_factory=Findings)
    """Mistakes found so far; one object for the whole document."""
    node: yaml.Node | None = None
    """The value as YAML has it; None where nothing is written, or the config was no text."""
    line: int | None = None
    """Line of the key, from 1, or of the parent of a missing key; None at the top level."""

    def __bool__(self) -> bool:
        """Whether anything is written here; empty lists, mappings and strings count as nothing."""
        return self.value is not None and self.value not in ([], {}, "")

    def error(self, problem: str) -> PlaceError:
        """Return the error to raise about this place."""
        error = PlaceError(f"{self.path}: {problem}" if self.path else problem)
        error.line = self.line
        return error

    def missing(self, key: str, problem: str) -> PlaceError:
        """Return the error to raise about a key that is not here, or else about one that was probably meant for it."""
        return self.misspelt(key) or self.get(key).error(problem)

    def misspelt(self, key: str) -> PlaceError | None:
        """Return the error about an unknown key that was probably meant for one that is not here, if there is one."""
        written = self.value if isinstance(self.value, dict) else {}
        unknown = [name for name in written if self.get(name).path in self.findings.unknown]
        near = find_near(key, unknown)
        return self.get(near).error(f"unknown key; did you mean {key!r}?") if near else None

    def note(self, error: PlaceError) -> None:
        """Note an error and go on."""
        self.findings.note(Finding(str(error), error.line), is_error=True)

    def warn(self, problem: str) -> None:
        """Note something that is probably a mistake, and does no harm."""
        self.findings.note(Finding(f"{self.path}: {problem}", self.line), is_error=False)

    def warn_unknown(self, problem: str) -> None:
        """Note a key that has no meaning."""
        self.findings.unknown.add(self.path)
        self.warn(problem)

    def attempt(self, parse: Callable[[Place], T]) -> T | None:
        """Return this place as `parse` reads it; None where that is an error, which is recorded."""
        try:
            return parse(self)
        except PlaceError as error:
            self.note(error)
            return None

    def names(self) -> tuple[str, ...]:
        """Return a mapping's keys, in the order of the file; none where nothing is written.

        Raises:
            ConfigError: it is not a mapping.
        """
        if self.value is None:
            return ()
        if not isinstance(self.value, dict):
            raise self.error(f"{shown(self.value)} is given, a mapping (`key: value`) is needed")
        return tuple(self.value)

    def get(self, key: str) -> Place:
        """Return the place under a key of a mapping."""
        value = self.value.get(key) if isinstance(self.value, dict) else None
        node, line = None, self.line
        if isinstance(self.node, yaml.MappingNode):
            for key_node, value_node in self.node.value:  # with the pairs of `<<` first
                if key_node.value == key:
                    node, line = value_node, key_node.start_mark.line + 1
        return Place(value, f"{self.path}.{key}" if self.path else key, self.findings, node, line)

    def elements(self) -> Iterator[Place]:
        """Yield the places of a list.

        Raises:
            ConfigError: it is not a list.
        """
        if not isinstance(self.value, list):
            raise self.error(f"{shown(self.value)} is given, a list is needed")
        nodes = self.node.value if isinstance(self.node, yaml.SequenceNode) else [None] * len(self.value)
        for index, (value, node) in enumerate(zip(self.value, nodes, strict=True)):
            line = node.start_mark.line + 1 if node else self.line
            yield Place(value, f"{self.path}[{index}]", self.findings, node, line)

    def text(self) -> str:
        """Return a string, which may not be blank.

        Raises:
            ConfigError: it is something else.
        """
        if not isinstance(self.value, str):
            number = isinstance(self.value, int | float)
            hint = "; put it in quotes" if number else ""
            raise self.error(f"{shown(self.value)} is given, a string is needed{hint}")
        if not self.value.strip():
            raise self.error("the string is empty")
        return self.value

    def check_keys(
        self, allowed: Collection[str], parameters: Iterable[str] = (), options: Mapping[str, str] = _NONE
    ) -> None:
        """Warn about keys that have no meaning here.

        Args:
            allowed: the keys that have.
            parameters: names of parameters, which belong one level down.
            options: options of the command, by the keys that people write for them.

        Raises:
            ConfigError: it is not a mapping.
        """
        for key in self.names():
            if key not in allowed:
                wanted = "it is a parameter; move it under `parameters`" if key in parameters else ""
                if key in options:
                    wanted = f"it is an option of the command: {options[key]} {shown(self.get(key).value)}"
                self.get(key).warn_unknown(f"unknown key, ignored; {wanted or suggest(key, allowed)}")
