"""Fine-tunes of one base whose tensors are called otherwise: names that begin in another way are matched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from raymerge.pipeline.checkpoint.model_config import count_layers
from raymerge.pipeline.checkpoint.names import find_layers
from raymerge.pipeline.checkpoint.tying import is_head
from raymerge.pipeline.checkpoint.views import RenamedView, View
from raymerge.pipeline.plan.forms.form import Model


def match_names(models: Sequence[Model]) -> tuple[list[Model], list[str]]:
    """Have every model seen under the names of the first, where all of them differ in their beginning alone.

    torch.compile puts `_orig_mod.` before each name, a submodule that is saved by itself keeps its name in the whole,
    and versions of transformers say `model.language_model.` for `model.`.

    Args:
        models: the donor first.

    Returns:
        The models, and a warning for each that is seen under other names than its own.
    """
    donor, *others = models
    matched, warnings = [donor], []
    for model in others:
        change = _find_change(model, donor)
        if change is not None:
            old, new = change
            view = RenamedView(model.view, old, new)
            model = replace(model, view=view, layers=find_layers(_list_sizes(view), count_layers(model.config)))
            warnings.append(
                f"{model.ref}: its names begin with {old!r} where those of {donor.ref} begin with {new!r}; all else is"
                " the same, and the tensors are matched by the rest"
            )
        matched.append(model)
    return matched, warnings


def _find_change(model: Model, donor: Model) -> tuple[str, str] | None:
    """Return the beginning of a model's names and the donor's for it; None where they have no such pair."""
    wanted = _without_head(donor.view)
    if not model.layers.main or not donor.layers.main or _without_head(model.view) == wanted:
        return None
    old, new = model.layers.main.split("."), donor.layers.main.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    pair = "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)
    return pair if pair[0] != pair[1] and _without_head(RenamedView(model.view, *pair)) == wanted else None


def _without_head(view: View) -> set[str]:
    """Return a model's names but for the head, which a tied model may lack."""
    return {name for name in view.names() if not is_head(name)}


def _list_sizes(view: View) -> list[tuple[str, int]]:
    return [(name, source.nbytes) for name in view.names() if (source := view.find(name))]
