"""Layers that are not alike: whether the output's config.json will make of each layer what its tensors are."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

from raymerge.pipeline.checkpoint.model_config import Json, text_part
from raymerge.pipeline.checkpoint.names import COMPUTED_BUFFER, OPTIONAL_BUFFERS, split_name
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.forms.stacked_config import read_layer

Kind = frozenset[tuple[str, tuple[int, ...]]]
"""Name without stack and number, and shape, of each tensor of a layer: thousands in mixtures of experts."""

_SHOWN = 4

_NUMBERED = re.compile(r"(.*?\.)([0-9]{1,4})(?:\.|$)")
_SIZE = re.compile(r"size|dim|rank|width")
"""Fields that may be the share of one layer."""


def group_layers(model: Model) -> Mapping[int, Sequence[str]]:
    """Return the names of each layer's tensors in the main stack, without the stack and the number."""
    rests: dict[int, list[str]] = {}
    for name in model.view.names():
        split = split_name(name)
        if split is not None and split.stack == model.layers.main:
            rests.setdefault(split.layer, []).append(split.rest)
    return rests


def check_layers(config: Json, donor: Model, origins: Sequence[tuple[Model, int]]) -> list[str]:
    """Return warnings of a stack that its config.json does not describe.

    Loaders build layer k by what config.json says of it by itself, or by its number. So it has to have the tensors of
    the donor's layers of which the same is said, or else of the donor's layer k.

    Args:
        config: of the output.
        donor: the model whose config.json it was made from.
        origins: for each output layer, the model that it comes from and its number there.
    """
    if not donor.layers.num_layers:
        return []
    models = {model.ref: model for model in (donor, *(model for model, _ in origins))}
    numbers: dict[Kind, int] = {}  # equal for equal kinds, and quicker to compare
    kinds = {
        ref: {layer: numbers.setdefault(kind, len(numbers)) for layer, kind in _find_kinds(model).items()}
        for ref, model in models.items()
    }
    own = [kinds[donor.ref].get(layer) for layer in range(donor.layers.num_layers)]
    said = [read_layer(donor.config, layer) for layer in range(len(own))]
    odd = []
    for k, (model, layer) in enumerate(origins):
        found = read_layer(config, k)
        candidates = {kind for kind, of_kind in zip(own, said, strict=True) if of_kind == found} or set(own)
        if len(candidates) > 1:  # a layer past the donor's own is probably like those at its end
            candidates = {own[k]} if k < len(own) else set(own[1:])
        if candidates != {kinds[model.ref].get(layer)}:
            odd.append(f"layer {k} (layer {layer} of {model.ref})")
    warnings = []
    if odd:
        warnings.append(
            f"the layers are not all alike, and config.json describes {counted(len(odd), 'layer')} otherwise than"
            f" their tensors: {listing(odd, _SHOWN)}; loaders will miss tensors there, or refuse them: choose ranges"
            " that keep the order of the kinds"
        )
    if [layer for _, layer in origins] != list(range(len(own))):
        warnings += [*_check_outside(donor), *_check_beside(donor)]
    return warnings


def _find_kinds(model: Model) -> dict[int, Kind]:
    """Return the kind of each layer of the main stack."""
    kinds = {}
    for layer, rests in group_layers(model).items():
        sources = ((rest, model.view.find(f"{model.layers.main}{layer}.{rest}")) for rest in rests)
        kinds[layer] = frozenset(
            (rest, source.shape)
            for rest, source in sources
            if source is not None and not f".{rest}".endswith((COMPUTED_BUFFER, *OPTIONAL_BUFFERS))
        )
    return kinds


def _check_outside(donor: Model) -> Iterator[str]:
    """Yield a warning for each tensor outside of the layers that has a part for each of them, as in Gemma 3n."""
    sizes = set(_list_numbers(donor.config))
    parts = [value for name, value in text_part(donor.config).items() if type(value) is int and _SIZE.search(name)]
    for name in donor.view.names():
        source = donor.view.find(name) if split_name(name) is None else None
        for size in source.shape if source else ():
            if size not in sizes and any(size == donor.layers.num_layers * part for part in parts):
                yield (
                    f"{name} is {list(source.shape if source else ())}: {size} is a multiple of the"
                    f" {counted(donor.layers.num_layers, 'layer')}, so it may have a part for each of them; it stays"
                    " as it is, and does not follow the layers"
                )


def _check_beside(donor: Model) -> Iterator[str]:
    """Yield a warning for each other row of tensors with an entry for every layer, as XLM has several."""
    parent = re.sub(r"[^.]+\.$", "", donor.layers.main)
    rows: dict[str, set[int]] = {}
    for name in donor.view.names():
        match = _NUMBERED.match(name)
        if match and match[1] != donor.layers.main and name.startswith(parent):
            rows.setdefault(match[1], set()).add(int(match[2]))
    for prefix, numbers in rows.items():
        if numbers == set(range(donor.layers.num_layers)):
            yield (
                f"{prefix}* has a number for each of the {counted(donor.layers.num_layers, 'layer')} under"
                f" {donor.layers.main}*; it stays as it is, and does not follow the layers"
            )


def _list_numbers(node: object) -> Iterator[int]:
    """Yield every whole number of a config.json."""
    if type(node) is int:
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from _list_numbers(child)
