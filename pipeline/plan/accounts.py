"""What becomes of every input tensor: none is dropped without a word."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from raymerge.pipeline.checkpoint.names import Layers, split_name
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.errors import TensorMismatchError
from raymerge.pipeline.messages import counted, listing

_SHOWN = 5
"""How many cases a message lists."""


class Accounts:
    """The books of a recipe: tensors used, dropped by a rule, missing, and misfits."""

    def __init__(self) -> None:
        self._used: set[tuple[ModelRef, str]] = set()
        self._dropped: dict[tuple[ModelRef, str], str] = {}
        self._problems: list[str] = []

    def use(self, model: ModelRef, name: str) -> None:
        """Note that an input tensor is merged."""
        self._used.add((model, name))

    def drop(self, model: ModelRef, name: str, rule: str) -> None:
        """Note that an input tensor is left out, and why."""
        self._dropped[model, name] = rule

    def is_dropped(self, model: ModelRef, name: str) -> bool:
        """Return whether a rule has left this tensor out."""
        return (model, name) in self._dropped

    def miss(self, name: str, model: ModelRef, has: Sequence[ModelRef]) -> None:
        """Note that a model lacks a tensor that others have."""
        self._problems.append(f"{name} is in {', '.join(map(str, has))}, but not in {model}")

    def mismatch(self, problem: str) -> None:
        """Note that tensors do not fit together."""
        self._problems.append(problem)

    def check(self) -> None:
        """Refuse a recipe that does not come out even.

        Raises:
            TensorMismatchError: a tensor is missing in a model, or tensors do not fit.
        """
        if not self._problems:
            return
        raise TensorMismatchError(
            "the inputs do not fit together:\n  "
            + listing(self._problems, _SHOWN, separator="\n  ")
            + "\nAll inputs need the same tensors in the same shapes; are they fine-tunes of one base?"
        )

    def explain_dropped(self, models: Iterable[tuple[ModelRef, Mapping[str, StoredTensor], Layers]]) -> tuple[str, ...]:
        """Return a line for each group of input tensors that are not in the output, with the rule for it."""
        groups: dict[tuple[ModelRef, str], list[str]] = {}
        for model, tensors, layers in models:
            for name in tensors:
                if (model, name) not in self._used:
                    rule = self._dropped.get((model, name)) or _explain(name, layers)
                    groups.setdefault((model, rule), []).append(name)
        return tuple(f"{model}: {count_tensors(names)}: {rule}" for (model, rule), names in groups.items())


def count_tensors(names: Sequence[str]) -> str:
    """Return how many tensors these are, and the first one's name.

    >>> count_tensors(["a"]), count_tensors(["a", "b"])
    ('1 tensor (a)', '2 tensors (a, ...)')
    """
    return f"{counted(len(names), 'tensor')} ({names[0]}{', ...' if len(names) > 1 else ''})"


def _explain(name: str, layers: Layers) -> str:
    """The rule by which slices leave out a tensor."""
    split = split_name(name)
    if split is not None and split.stack == layers.main:
        if split.layer >= layers.num_layers:
            return "layers past the model's own, for multi-token prediction; slices stack the model's own layers"
        return "layers in no slice"
    return "embeddings come from the first slice's models, final norm and head from the last slice's"
