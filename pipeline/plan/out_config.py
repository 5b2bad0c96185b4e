"""The output's config.json: the donor's, with what the merge changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.model_config import (
    Json,
    compare_configs,
    contradicts_itself_on_tying,
    count_layers,
    set_dtype,
    set_tied,
    text_part,
    ties_embeddings,
)
from raymerge.pipeline.checkpoint.names import split_name
from raymerge.pipeline.checkpoint.views.quantised import drop_quantisation
from raymerge.pipeline.checkpoint.views.tying import find_embedding, find_head, is_headless
from raymerge.pipeline.messages import counted, shown
from raymerge.pipeline.plan.forms.form import EMBEDDING_FIELDS, Form, Model
from raymerge.pipeline.plan.types import TensorMerge


def make_out_config(form: Form, merges: Sequence[TensorMerge], donor: Model) -> tuple[Json, list[str]]:
    """Return the output's config.json, and warnings.

    Args:
        form: of the merge.
        merges: every output tensor.
        donor: the model whose config.json is taken, as it is stored.
    """
    config = form.make_config(copy.deepcopy(donor.config))
    drop_quantisation(config)
    warnings = []
    out_has_head = find_head(merge.name for merge in merges) is not None
    knows_embedding = find_embedding(donor.view.names()) is not None  # T5 scales by the flag, and stores the head twice
    if out_has_head and (donor.is_tied or (ties_embeddings(config) and knows_embedding)):
        set_tied(config, False)
        if donor.is_tied:
            warnings.append(
                f"the inputs do not share one tied embedding, so the output gets a head of its own and "
                f"tie_word_embeddings: false ({donor.ref} has it tied)"
            )
    elif not out_has_head:
        is_another_tied = any(model.is_tied for model in form.models.values())
        loses_head = not donor.is_tied and find_head(donor.view.names()) is not None
        if (loses_head and is_another_tied) or (donor.is_tied and contradicts_itself_on_tying(config)):
            set_tied(config, True)
    nbytes_by_dtype: Counter[str] = Counter()
    for merge in merges:
        if DTYPES[merge.out_dtype].is_mergeable:
            nbytes_by_dtype[merge.out_dtype] += merge.nbytes
    if nbytes_by_dtype:
        set_dtype(config, DTYPES[nbytes_by_dtype.most_common(1)[0][0]].torch_name)
    return config, warnings


def check_configs(models: Iterable[Model], *, moves_layers: bool) -> list[str]:
    """Return warnings of config.json files that differ in meaning, or count layers that are not there.

    Args:
        models: the donor first.
        moves_layers: whether the output's layers are numbered anew.
    """
    models = list(models)
    warnings = compare_configs([(model.ref, model.config) for model in models], is_stack=moves_layers)
    for model in models:
        stated = count_layers(model.config)
        groups = text_part(model.config).get("num_hidden_groups")  # layers of ALBERT share their weights
        if stated is not None and stated > model.layers.num_layers and groups is None:
            warnings.append(
                f"{model.ref}: config.json states {counted(stated, 'layer')}, and the checkpoint has"
                f" {model.layers.num_layers}; is it complete?"
            )
        warnings += [*_check_head(model), *_check_embedding(model)]
        if model.quantisation.stated and not model.quantisation.packed:
            warnings.append(
                f"{model.ref}: {', '.join(model.quantisation.stated)}, but the weights are whole; the output's"
                " config.json does not say that it is quantised"
            )
    return warnings


def _check_head(model: Model) -> Iterator[str]:
    """Yield a warning where config.json and the stored tensors disagree about the output head."""
    embedding = model.view.find(find_embedding(model.view.names()) or "")
    if is_headless(model.config) or embedding is None:
        return
    stated, head = ties_embeddings(model.config), find_head(model.view.names())
    if stated and head and not model.is_tied:
        yield (
            f"{model.ref}: config.json says tie_word_embeddings: true, and {head} is stored with other values than the"
            " embedding; it counts as the head, as in transformers 5, while older loaders ignore it"
        )
    outside = (model.view.find(name) for name in model.view.names() if split_name(name) is None)
    alike = [source.name for source in outside if source and source.shape == embedding.shape]
    is_inside = "." in embedding.name.removesuffix(".weight")  # a model without a head keeps the names of its inside
    if stated is False and head is None and is_inside and alike == [embedding.name]:
        yield (
            f"{model.ref}: config.json says tie_word_embeddings: false, and no head is stored, so loaders make one of"
            " random numbers; if the embedding is the head, say true there"
        )


def _check_embedding(model: Model) -> Iterator[str]:
    """Yield a warning for each side of the embedding that has another size than config.json states."""
    embedding = model.view.find(find_embedding(model.view.names()) or "")
    if embedding is None or len(embedding.shape) != 2:
        return
    part = text_part(model.config)
    head = model.view.find(find_head(model.view.names()) or "")  # rows of the embedding alone may be for images
    for field, size in zip(EMBEDDING_FIELDS, embedding.shape, strict=True):
        stated = part.get(field)
        if stated is not None and type(stated) is not int:
            yield (
                f"{model.ref}: config.json states {field} {shown(stated)}, no whole number, and {embedding.name} is"
                f" {list(embedding.shape)}; most loaders refuse that"
            )
            continue
        is_of_head = head is not None and stated in head.shape
        if stated is not None and stated != size and size not in part.values() and not is_of_head:
            yield (
                f"{model.ref}: config.json states {field} {stated}, and {embedding.name} is {list(embedding.shape)};"
                " most loaders refuse that"
            )
