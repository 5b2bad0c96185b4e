"""References to models: a directory, a URL or a repository, at a revision."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ModelRef:
    """A checkpoint as the config names it; equal references are read once."""

    path: str
    """A directory, its URL, or the name of a Hub repository."""
    revision: str | None = None
    adapter: ModelRef | None = None
    """The LoRA adapter that is applied to it, named in the same way."""

    @property
    def without_adapter(self) -> ModelRef:
        """The model alone."""
        return ModelRef(self.path, self.revision)

    def __str__(self) -> str:
        model = f"{self.path}@{self.revision}" if self.revision else self.path
        return f"{model}+{self.adapter}" if self.adapter else model
