"""Ways to look at a model: which tensors it has, and what they are made of. Views stack."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.checkpoint.views.tying import find_embedding, find_head


class View(ABC):
    """A model as a merge sees it. Whoever plans a merge asks for names and sources, and never how they come about.

    A view that stands on another one changes what that one shows: it decodes, adds, renames or hides tensors.
    """

    ref: ModelRef

    @abstractmethod
    def names(self) -> Collection[str]:
        """Return the tensors that there are, in the order of the files."""

    @abstractmethod
    def find(self, name: str) -> Source | None:
        """Return a tensor; None where there is none of this name."""

    def hidden(self) -> Mapping[str, str]:
        """Return the tensors that are left out on purpose, each with the rule that says so."""
        return {}

    def seen(self, stored: str) -> str:
        """Return the name under which a stored tensor is seen, or would be if it were not hidden."""
        return stored


class StoredView(View):
    """The tensors as the checkpoint stores them, or as a plan makes them."""

    def __init__(self, ref: ModelRef, tensors: Mapping[str, Source]) -> None:
        self.ref = ref
        self._tensors = tensors

    def names(self) -> Collection[str]:
        """Return the stored names."""
        return self._tensors.keys()

    def find(self, name: str) -> Source | None:
        """Return the tensor."""
        return self._tensors.get(name)


class TiedView(View):
    """A model whose output head is its embedding: a head that is stored has the same values."""

    def __init__(self, below: View, head: str | None) -> None:
        """Look at a tied model.

        Args:
            below: the model as stored.
            head: the name under which the embedding is seen as head as well; None if the output is tied, too.
        """
        self.ref = below.ref
        self._below = below
        self._head = head
        self._stored_head = find_head(below.names())
        self._embedding = find_embedding(below.names())

    def names(self) -> Collection[str]:
        """Return the names below, but for a stored head, and that of the head."""
        names = [name for name in self._below.names() if name != self._stored_head]
        return [*names, self._head] if self._head else names

    def find(self, name: str) -> Source | None:
        """Return the embedding in place of the head."""
        if name == self._head:
            return self._below.find(self._embedding or name)
        return None if name == self._stored_head else self._below.find(name)

    def hidden(self) -> Mapping[str, str]:
        """Return the stored head."""
        if self._stored_head is None:
            return self._below.hidden()
        rule = "the head is tied to the embedding, whose values it has"
        if self._head is not None:
            rule += " and which is merged instead"
        return {**self._below.hidden(), self._stored_head: rule}

    def seen(self, stored: str) -> str:
        """Return the name below."""
        return self._below.seen(stored)


class PartView(View):
    """A model without some of its tensors."""

    def __init__(self, below: View, hidden: Mapping[str, str]) -> None:
        """Look at a part of a model.

        Args:
            below: the whole.
            hidden: tensors that are left out, each with the rule that says so.
        """
        self.ref = below.ref
        self._below = below
        self._hidden = hidden

    def names(self) -> Collection[str]:
        """Return the names below, but for what is hidden."""
        return [name for name in self._below.names() if name not in self._hidden]

    def find(self, name: str) -> Source | None:
        """Return the tensor below if it is not hidden."""
        return None if name in self._hidden else self._below.find(name)

    def hidden(self) -> Mapping[str, str]:
        """Return the tensors that this view and those below leave out."""
        return {**self._below.hidden(), **self._hidden}

    def seen(self, stored: str) -> str:
        """Return the name below."""
        return self._below.seen(stored)


class RenamedView(View):
    """A model whose names begin in another way."""

    def __init__(self, below: View, changes: Mapping[str, str]) -> None:
        """Look at a model under other names.

        Args:
            below: the model.
            changes: beginnings of names, and what they are seen as; the longest one that fits counts.
        """
        self.ref = below.ref
        self._below = below
        self._changes = sorted(changes.items(), key=lambda change: -len(change[0]))
        self._stored = {self._rename(name): name for name in below.names()}

    def names(self) -> Collection[str]:
        """Return the names below, each with the new beginning."""
        return self._stored.keys()

    def find(self, name: str) -> Source | None:
        """Return the tensor that is seen under a name."""
        stored = self._stored.get(name)
        return None if stored is None else self._below.find(stored)

    def hidden(self) -> Mapping[str, str]:
        """Return those below."""
        return {self._rename(name): rule for name, rule in self._below.hidden().items()}

    def seen(self, stored: str) -> str:
        """Return the name with the new beginning."""
        return self._rename(self._below.seen(stored))

    def _rename(self, name: str) -> str:
        for old, new in self._changes:
            if name.startswith(old):
                return new + name[len(old) :]
        return name


class ModuleView(View):
    """One module of a model: what else there is belongs to other modules, and is accounted for there."""

    def __init__(self, below: View, holds: Callable[[str], bool]) -> None:
        """Look at a module.

        Args:
            below: the whole model.
            holds: tells by its name whether a tensor lies in the module.
        """
        self.ref = below.ref
        self._below = below
        self._names = dict.fromkeys(filter(holds, below.names()))

    def names(self) -> Collection[str]:
        """Return the names in the module."""
        return self._names.keys()

    def find(self, name: str) -> Source | None:
        """Return a tensor of the module."""
        return self._below.find(name) if name in self._names else None

    def seen(self, stored: str) -> str:
        """Return the name below."""
        return self._below.seen(stored)
