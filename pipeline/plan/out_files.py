"""The files of an output: networks with files of weights of their own, and what is no shard."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymerge.pipeline.checkpoint.files import CONFIG, index_of
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.inline import InlineFile


@dataclass(frozen=True, slots=True)
class Copied:
    """A file of the output that is copied from an input."""

    name: str
    """In the output."""
    source: StoredFile

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.source.nbytes

    @property
    def identity(self) -> list[str | int]:
        """Everything that decides its content."""
        return [self.name, self.nbytes, self.source.content_id]


@dataclass(frozen=True, slots=True)
class Written:
    """A file of the output that the plan makes."""

    name: str
    """In the output."""
    text: str = field(repr=False)

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return len(self.text.encode())

    @property
    def identity(self) -> list[str | int]:
        """Everything that decides its content."""
        return [self.name, self.text]


SideFile = Copied | Written
"""A file of the output that is no shard."""


def carry(name: str, file: StoredFile) -> SideFile:
    """Return a file of an input as one of the output, under a name: what is stored nowhere is written."""
    return Written(name, file.content.decode()) if isinstance(file, InlineFile) else Copied(name, file)


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the output, with a config.json and files of weights of its own: a model is one."""

    prefix: str = ""
    """Directory of a pipeline's component and a slash: prefix of the names of its tensors and files; else empty."""
    stem: str = "model"
    """Stem of its files of weights, before the number of a shard."""
    config_name: str = CONFIG
    """Name of its config: adapter_config.json, if it is no network but an adapter of one."""

    @property
    def config(self) -> str:
        """The name of its config."""
        return f"{self.prefix}{self.config_name}"

    @property
    def index(self) -> str:
        """The name of its index, which it has if it is in several files."""
        return f"{self.prefix}{index_of(self.stem)}"
