"""Fine-tunes of one base whose tensors are called otherwise, and language models that are part of multimodal ones."""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from dataclasses import replace

from raymerge.pipeline.checkpoint.model_config import count_layers, list_sections
from raymerge.pipeline.checkpoint.modules import common_prefix, find_modules
from raymerge.pipeline.checkpoint.names import OTHER_SENSES, find_layers, split_name
from raymerge.pipeline.checkpoint.views.tying import is_head
from raymerge.pipeline.checkpoint.views.view import PartView, RenamedView, View
from raymerge.pipeline.plan.forms.form import Model, say_architectures
from raymerge.pipeline.plan.sources.accounts import count_tensors

_LAYOUTS = (
    ("experts", re.compile(r"\.experts\.\d+\."), re.compile(r"\.experts\.(?!\d)")),
    (
        "query, key and value",
        re.compile(r"\.(?:q_proj|k_proj|v_proj|query|key|value)\."),
        re.compile(r"\.(?:\w*qkv|query_key_value|c_attn)"),
    ),
    ("gate and up projections", re.compile(r"\.(?:gate|up)_proj\."), re.compile(r"\.gate_up")),
)
"""Tensors that some versions of an architecture store one by one, and others fused, with patterns of their names."""
_PLURAL = re.compile(r"s(?=[._]|$)")
_SAVE_AGAIN = (
    "to give both the same names, load each with transformers 5 and save it by save_pretrained(...,"
    " save_original_format=False)"
)


def match_names(models: Sequence[Model], *, takes_parts: bool) -> tuple[list[Model], list[str]]:
    """Have every model seen under the names of the first, where all of them differ in their beginning alone.

    torch.compile puts `_orig_mod.` before each name, a submodule that is saved by itself keeps its name in the whole,
    and versions of transformers say `model.language_model.` for `model.`, or change the names of several modules. A
    language model may also be among the parts of a multimodal one, whose other tensors it lacks. How many layers each
    has does not matter here.

    Args:
        models: the donor first.
        takes_parts: whether a language model may be merged with that of a multimodal model.

    Returns:
        The models, and a warning for each that is seen under other names than its own, or in part.
    """
    donor, *others = models
    matched, warnings = [donor], []
    for model in others:
        wanted = _find_kinds(donor.view)
        view = _rename(model.view, model, donor)
        how = _say_change(model, donor)
        if wanted in (_find_kinds(model.view), _find_kinds(view)):
            if wanted != _find_kinds(model.view):
                model = _look(model, view)
                warnings.append(
                    f"{model.ref}: its {how}; all else is the same, and the tensors are matched by the rest"
                )
        elif changes := _find_changes(model, donor):
            model = _look(model, RenamedView(model.view, changes))
            said = ", ".join(f"{old!r} for {new!r}" for old, new in changes.items())
            warnings.append(
                f"{model.ref}: its modules are called otherwise than those of {donor.ref} ({said}); all else is the"
                " same, and the tensors are matched by the rest"
            )
        elif takes_parts and (extra := _find_extra(model, donor)):
            model = replace(_look(model, view), lacks=frozenset(extra))
            warnings.append(
                f"{model.ref}: a language model like the one in {donor.ref}, and merged with that ({how});"
                f" merged without it, or copied if only one model has them: {count_tensors(extra)}"
            )
        elif takes_parts and (extra := _find_extra(donor, model)):
            rule = f"the output is a language model like {donor.ref}"
            part = PartView(model.view, dict.fromkeys(extra, rule))
            model = _look(model, _rename(part, model, donor))
            warnings.append(
                f"{model.ref}: a multimodal model, of which only the language model is merged ({how}): {donor.ref}"
                f" has nothing else; left out: {count_tensors(extra)}; to keep them, add `copy_rest_from: {model.ref}`"
            )
        matched.append(model)
    return matched, warnings


def explain_names(models: Sequence[Model]) -> str:
    """Return why models of one architecture may have other names, and the next step; empty where nothing is known."""
    donor, *others = models
    for model in others:
        names, wanted = _without_head(_rename(model.view, model, donor)), _without_head(donor.view)
        sides = (donor, sorted(wanted - names)), (model, sorted(names - wanted))
        for (one, apart), (other, together) in (sides, sides[::-1]):
            for noun, single, fused in _LAYOUTS:
                first, second = next(filter(single.search, apart), ""), next(filter(fused.search, together), "")
                if first and second:
                    return (
                        f"{one.ref} stores {noun} one by one ({first}), {other.ref} together ({second}); {_SAVE_AGAIN}."
                    )
        plain = {_PLURAL.sub("", name): name for name in sides[1][1]}
        alike = [(name, plain[_PLURAL.sub("", name)]) for name in sides[0][1] if _PLURAL.sub("", name) in plain]
        if alike:
            name, its_name = alike[0]
            return f"What {donor.ref} calls {name}, {model.ref} calls {its_name}; {_SAVE_AGAIN}, or rename the tensors."
        if names != wanted and model.layers.main != donor.layers.main:
            one, rest = next(side for side in sides if side[1])
            return f"{model.ref}: {_say_change(model, donor)}; even so, {count_tensors(rest)} are in {one.ref} alone."
    return next(filter(None, (say_architectures(donor, model) for model in others)), "")


def _find_change(model: Model, donor: Model) -> tuple[str, str]:
    """Return how a model's names begin and how the donor's do, up to what both have in common before the layers."""
    old, new = model.layers.main.split("."), donor.layers.main.split(".")
    while old and new and old[-1] == new[-1]:
        old.pop()
        new.pop()
    return "".join(f"{part}." for part in old), "".join(f"{part}." for part in new)


def _find_changes(model: Model, donor: Model) -> dict[str, str]:
    """Return how the names of each module begin, and how the donor's do, if that is all that differs."""
    ours, theirs = (find_modules(each.view.names(), each.layers) for each in (donor, model))
    changes: dict[str, str] = {}
    for module in theirs.found:
        like = [each for each in ours.found if each.role == module.role and (module.role or each.name == module.name)]
        if len(like) == 1:
            old, new = (
                common_prefix(name for name in all_names if each.match(name) and not is_head(name))
                for each, all_names in ((module, theirs.names), (like[0], ours.names))
            )
            changes |= {old: new} if old != new else {}
    is_same = changes and _find_kinds(RenamedView(model.view, changes)) == _find_kinds(donor.view)
    return changes if is_same else {}


def _say_change(model: Model, donor: Model) -> str:
    old, new = _find_change(model, donor)
    return (
        f"names begin with {old!r} where those of {donor.ref} begin with {new!r}"
        if old != new
        else "under the same names"
    )


def _rename(view: View, model: Model, donor: Model) -> View:
    """Return a view of a model by the names that the donor would have for them."""
    old, new = _find_change(model, donor)
    return RenamedView(view, {old: new}) if old != new and model.layers.main and donor.layers.main else view


def _look(model: Model, view: View) -> Model:
    sizes = [(name, source.nbytes) for name in view.names() if (source := view.find(name))]
    return replace(model, view=view, layers=find_layers(sizes, count_layers(model.config)))


def _find_extra(part: Model, whole: Model) -> list[str]:
    """Return the tensors that a multimodal model has besides its language model; none where the other is not that."""
    names, wanted = _find_kinds(_rename(part.view, part, whole)), _find_kinds(whole.view)
    inside = re.sub(r"[^.]+\.$", "", whole.layers.main)  # whatever lies beside the layers is part of the language model
    extra = sorted(name for name in _without_head(whole.view) if _without_number(name) not in names)
    is_multimodal = any(OTHER_SENSES.search(key) for section in list_sections(whole.config) for key in section)
    is_part = inside and names <= wanted and all(name.startswith(inside) for name in names)
    is_whole = not any(name.startswith(inside) for name in extra)
    return extra if is_multimodal and is_part and is_whole else []


def _without_head(view: View) -> Set[str]:
    """Return a model's names but for the head, which a tied model may lack."""
    return {name for name in view.names() if not is_head(name)}


def _find_kinds(view: View) -> Set[str]:
    """Return a model's names but for the head, without the numbers of layers: how many there are is checked later."""
    return {_without_number(name) for name in _without_head(view)}


def _without_number(name: str) -> str:
    split = split_name(name)
    return name if split is None else f"{split.stack}*.{split.rest}"
