"""Accounts of every input tensor: none is dropped without a word."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Source
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted, escaped, listing

_SHOWN = 5
"""Cases that a message lists."""


class Accounts:
    """The books of a recipe: tensors used, dropped by a rule, missing, and misfits."""

    def __init__(self) -> None:
        self._used: set[tuple[str, str]] = set()
        self._dropped: dict[tuple[str, str], str] = {}
        self._problems: list[str] = []

    def use(self, source: Source) -> None:
        """Note that a source is used, and the stored tensors behind it."""
        self._used.add((source.model, source.name))
        self._used.update((tensor.model, tensor.name) for tensor in source.origins)

    def drop(self, model: ModelRef, name: str, rule: str) -> None:
        """Note that a tensor, by the name under which it is seen, is left out, and why."""
        self._dropped[str(model), name] = rule

    def miss(self, name: str, model: ModelRef, has: Sequence[ModelRef]) -> None:
        """Note that a model lacks a tensor that others have."""
        self._problems.append(f"{escaped(name)} is in {', '.join(map(str, has))}, but not in {model}")

    def mismatch(self, problem: str) -> None:
        """Note that tensors do not fit together."""
        self._problems.append(problem)

    def check(self, explain: Callable[[], str] = str) -> None:
        """Refuse a recipe with missing or misfit tensors.

        Args:
            explain: says why names may differ, if that is known.

        Raises:
            TensorMismatchError: a tensor is missing in a model, or tensors do not fit.
        """
        if not self._problems:
            return
        raise TensorMismatchError(
            "the inputs do not fit together:\n  "
            + listing(self._problems, _SHOWN, separator="\n  ")
            + "\n"
            + (explain() or "All inputs need the same tensors in the same shapes; are they fine-tunes of one base?")
        )

    def explain_dropped(
        self,
        stored: Mapping[ModelRef, Iterable[str]],
        seen: Callable[[ModelRef, str], str],
        explain: Callable[[ModelRef, str], str],
    ) -> tuple[str, ...]:
        """Return a line for each group of stored tensors that are not in the output, with the rule for it.

        Args:
            stored: the names of each model's tensors.
            seen: returns the name under which a stored tensor is seen.
            explain: returns the rule for a tensor, by that name, that nothing has used or dropped.
        """
        groups: dict[tuple[ModelRef, str], list[str]] = {}
        for model, names in stored.items():
            for name in names:
                if (str(model), name) not in self._used:
                    shown = seen(model, name)
                    rule = self._dropped.get((str(model), shown)) or explain(model, shown)
                    groups.setdefault((model, rule), []).append(name)
        return tuple(f"{model}: {count_tensors(names)}: {rule}" for (model, rule), names in groups.items())


def count_tensors(names: Sequence[str]) -> str:
    """Return how many tensors these are, and the first one's name.

    >>> count_tensors(["a"]), count_tensors(["a", "b"])
    ('1 tensor (a)', '2 tensors (a, ...)')
    """
    return f"{counted(len(names), 'tensor')} ({names[0]}{', ...' if len(names) > 1 else ''})"
