"""A place in a config: what is written there and the path that messages call it by."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field

from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import shown, suggest


@dataclass(frozen=True, slots=True)
class Place:
    """One value of the YAML; everything below it is reached through `get` and `elements`."""

    value: object
    """None where nothing is written."""
    path: str = ""
    """Such as `models[1].parameters.weight`; empty for the whole document."""
    warnings: list[str] = field(default_factory=list)
    """Where `warn` writes to; one list for the whole document."""

    def __bool__(self) -> bool:
        """Whether anything is written here; empty lists, mappings and strings count as nothing."""
        return self.value is not None and self.value not in ([], {}, "")

    def error(self, problem: str) -> ConfigError:
        """Return the error to raise about this place."""
        return ConfigError(f"{self.path}: {problem}" if self.path else problem)

    def warn(self, problem: str) -> None:
        """Note something that is probably a mistake, and does no harm."""
        self.warnings.append(f"{self.path}: {problem}")

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
        return Place(value, f"{self.path}.{key}" if self.path else key, self.warnings)

    def elements(self) -> Iterator[Place]:
        """Yield the places of a list.

        Raises:
            ConfigError: it is not a list.
        """
        if not isinstance(self.value, list):
            raise self.error(f"{shown(self.value)} is given, a list is needed")
        for index, value in enumerate(self.value):
            yield Place(value, f"{self.path}[{index}]", self.warnings)

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

    def check_keys(self, allowed: Collection[str], parameters: Iterable[str] = ()) -> None:
        """Warn about keys that have no meaning here.

        Args:
            allowed: the keys that have.
            parameters: names of parameters, which belong one level down.

        Raises:
            ConfigError: it is not a mapping.
        """
        for key in self.names():
            if key not in allowed:
                wanted = "it is a parameter; move it under `parameters`" if key in parameters else ""
                self.get(key).warn(f"unknown key, ignored; {wanted or suggest(key, allowed)}")
