"""Checkpoints that are nothing but names, dtypes and shapes: what the planner sees of real ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from raymerge.ops.kernels.copy import Identical
from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.plan.forms.modules import settle_modules
from raymerge.pipeline.plan.memory.projection import Demand, Transfer
from raymerge.pipeline.plan.recipe import Recipe, expand, open_model
from raymerge.pipeline.plan.sources.resolve import COPY
from raymerge.pipeline.plan.types import TensorMerge, Variant
from raymerge.pipeline.stores.files import ALIGNMENT, StoredFile

Shapes = Mapping[str, tuple[int, ...]]

TRANSFERS = st.builds(Transfer, st.integers(1, 2), st.integers(0, 2**24))
DEMANDS = st.lists(
    st.builds(
        Demand,
        block_elements=st.just(2**16),
        num_blocks=st.integers(1, 100),
        num_passes=st.integers(0, 3),
        block_nbytes=st.integers(1, 2**26),
        scratch_nbytes=st.integers(0, 2**25),
        state_nbytes=st.integers(0, 2**22),
        out_nbytes=st.integers(0, 2**19),
        kept_nbytes=st.integers(0, 2**24).map(lambda n: n * ALIGNMENT),
    ),
    min_size=1,
    max_size=5,
)


@dataclass(frozen=True)
class Layout:
    """One checkpoint."""

    shapes: Shapes
    config: Mapping[str, Any] = field(default_factory=dict)
    dtype: str = "BF16"
    dtypes: Mapping[str, str] = field(default_factory=dict)
    """Where they differ from `dtype`."""
    has_own_head: bool = False
    """Whether the head has other values than the embedding, whatever the config says."""


def llama(num_layers: int = 2, *, head: bool = True, past: int = 0, **config: Any) -> Layout:
    """Return a Llama of few tensors; `past` more layers follow those that config.json counts."""
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (8, 4)}
    for k in range(num_layers + past):
        shapes[f"model.layers.{k}.mlp.up_proj.weight"] = (6, 4)
        shapes[f"model.layers.{k}.self_attn.q_proj.weight"] = (4, 4)
    shapes["model.norm.weight"] = (4,)
    if head:
        shapes["lm_head.weight"] = (8, 4)
    return Layout(shapes, {"num_hidden_layers": num_layers, "architectures": ["LlamaForCausalLM"], **config})


def bare(names: Iterable[str], **config: Any) -> Layout:
    """Return a checkpoint of these tensors, all of one shape."""
    return Layout(dict.fromkeys(names, (2, 2)), config)


def stored_tensors(model: str, layout: Layout) -> dict[str, StoredTensor]:
    """Return the tensors as if they lay in one file, one after the other."""
    dtypes = {name: layout.dtypes.get(name, layout.dtype) for name in layout.shapes}
    nbytes = {name: math.prod(shape) * DTYPES[dtypes[name]].num_bits // 8 for name, shape in layout.shapes.items()}
    file = StoredFile(f"/models/{model}/model.safetensors", 1000 + sum(nbytes.values()), f"etag of {model}")
    tensors = {}
    start = 1000
    for name, shape in layout.shapes.items():
        tensors[name] = StoredTensor(model, name, dtypes[name], shape, file, start, start + nbytes[name])
        start += nbytes[name]
    return tensors


def expand_layouts(config: Path | Mapping[str, Any], models: Mapping[str, Layout]) -> Recipe:
    """Return the recipe for a merge config over checkpoints of these names."""
    merge_config = load_config(config)
    checkpoints = [
        Checkpoint(model, f"/models/{model}", dict(models[str(model)].config), (), {})
        for model in merge_config.referenced_models
    ]
    opened = []
    for checkpoint in checkpoints:
        layout = models[str(checkpoint.model)]
        tensors = stored_tensors(str(checkpoint.model), layout)
        opened.append(open_model(checkpoint, tensors, has_own_head=layout.has_own_head))
    found = {model.ref: model for model in opened}
    merge_config = settle_modules(merge_config, found)
    return expand(merge_config, [found[ref] for ref in merge_config.referenced_models])


def linear(*models: str, **more: Any) -> dict[str, Any]:
    """Return a linear merge of whole models, with equal weights."""
    return {
        "merge_method": "linear",
        "models": [{"model": model} for model in models],
        "parameters": {"weight": 1.0},
        **more,
    }


def passthrough(*parts: tuple[str, int, int], **more: Any) -> dict[str, Any]:
    """Return a stack of layers [start, stop) of one model each."""
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": model, "layer_range": [start, stop]}]} for model, start, stop in parts],
        **more,
    }


def by_name(recipe: Recipe) -> dict[str, TensorMerge]:
    """Return the output tensors by name."""
    return {merge.name: merge for merge in recipe.merges}


def source_names(merge: TensorMerge) -> list[tuple[str, str]]:
    """Return the model and the name of each source."""
    return [(source.model, source.name) for source in merge.sources]


def parameter(merge: TensorMerge, name: str) -> Any:
    """Return one resolved parameter."""
    return parameters_of(merge)[name]


def parameters_of(merge: TensorMerge) -> dict[str, Any]:
    """Return the resolved parameters of the only variant."""
    (variant,) = merge.variants
    return dict(variant.parameters)


def make_merge(
    name: str = "w",
    num_elements: int = 100,
    *,
    op: str = "linear",
    parameters: Mapping[str, Any] | None = None,
    dtypes: Sequence[str] = ("BF16", "BF16"),
    out_dtype: str = "BF16",
    start: int = 0,
    seed: int = 0,
) -> TensorMerge:
    """Return one output tensor of flat sources, each in a file of its own."""
    sources = tuple(
        StoredTensor(
            f"m{k}", name, dtype, (num_elements,), StoredFile(f"/m{k}/model.safetensors", 2**50, f"e{k}"),
            start, start + num_elements * DTYPES[dtype].num_bits // 8,
        )
        for k, dtype in enumerate(dtypes)
    )  # fmt: skip
    if parameters is None:
        parameters = {"weight": (1.0,) * len(dtypes), "normalize": True}
    if op == COPY:
        copied = tuple(source.as_bytes() for source in sources)
        return TensorMerge(name, (num_elements,), out_dtype, "U8", op, copied, (Variant((), Identical(), seed),))
    return TensorMerge(name, (num_elements,), out_dtype, out_dtype, op, sources, (make_variant(op, parameters, seed),))


def make_variant(op: str, parameters: Mapping[str, Any], seed: int = 0) -> Variant:
    """Return one variant of a tensor."""
    return Variant(tuple(parameters.items()), find_op(op).kernel(parameters), seed)


def model_refs(*names: str) -> list[ModelRef]:
    """Return references to models of these names."""
    return [ModelRef(name) for name in names]


def named(demands: Sequence[Demand]) -> dict[str, Demand]:
    """Return demands by names of tensors."""
    return {f"tensor{k}": demand for k, demand in enumerate(demands)}
