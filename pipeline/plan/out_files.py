"""The files of an output: networks with files of weights of their own, and what is no shard."""

from __future__ import annotations

from dataclasses import dataclass, field

from raymerge.pipeline.checkpoint.files import CONFIG, index_of
from raymerge.pipeline.stores.files import StoredFile


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


@dataclass(frozen=True, slots=True)
class Network:
    """A network of the output, with a config.json and files of weights of its own: a model is one."""

    prefix: str = ""
    """Of a pipeline's component: its directory and a slash, with which the names of its tensors and files begin."""
    stem: str = "model"
    """What its files of weights are called, before the number of a shard."""
    config_name: str = CONFIG
    """What its config is called: adapter_config.json, if it is no network but an adapter of one."""

    @property
    def config(self) -> str:
        """The name of its config."""
        return f"{self.prefix}{self.config_name}"

    @property
    def index(self) -> str:
        """The name of its index, which it has if it is in several files."""
        return f"{self.prefix}{index_of(self.stem)}"
