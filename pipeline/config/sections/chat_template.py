"""The key `chat_template`: the models' own, one by its name, a file of one, or its text."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import suggest

AUTO = "auto"

_SUFFIXES = (".jinja", ".jinja2", ".j2")
_MAX_NBYTES = 2**20
_MIN_LENGTH = 20
"""Length from which a text is a template; a shorter one is a name, as in mergekit."""


@dataclass(frozen=True, slots=True)
class TemplateChoice:
    """The chat template that an output gets."""

    origin: str
    """`auto`, a built-in name, a file, or empty for text of the config."""
    text: str | None = field(repr=False)
    """In Jinja; None for the one that most models have."""

    @property
    def is_file(self) -> bool:
        """Whether it was read from a file of this machine."""
        return self.origin not in ("", AUTO, *BUILTIN)


def parse_chat_template(place: Place) -> TemplateChoice | None:
    """Return the template that the config asks for; None where it asks for none.

    Raises:
        ConfigError: it is no name, no file that can be read, and no text of a template.
    """
    if place.value is None:
        return None
    written = place.text()
    name = written.strip()
    if name == AUTO:
        return TemplateChoice(AUTO, None)
    if name in BUILTIN:
        return TemplateChoice(name, BUILTIN[name])
    if names_template_file(name):
        return TemplateChoice(name, _read(place, Path(name)))
    if "{" not in written or len(written) < _MIN_LENGTH:
        advice = suggest(name[:80], (AUTO, *BUILTIN))
        raise place.error(
            f"{name[:80]!r} is no chat template; {advice}, a file ({', '.join(_SUFFIXES)}), or Jinja text"
        )
    return TemplateChoice("", written)


def names_template_file(text: str) -> bool:
    """Tell whether a value of the key is the name of a file.

    >>> names_template_file("templates/mine.jinja"), names_template_file("chatml"), names_template_file("{{ x }}.j2")
    (True, False, False)
    """
    return text.endswith(_SUFFIXES) and "\n" not in text and "{" not in text


def _read(place: Place, path: Path) -> str:
    try:
        with path.expanduser().open("rb") as file:
            data = file.read(_MAX_NBYTES + 1)
        if len(data) <= _MAX_NBYTES:
            return data.decode()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or str(error)
        raise place.error(f"cannot read {path}: {why}") from error
    raise place.error(f"{path} is larger than {_MAX_NBYTES} bytes; this is no chat template")
