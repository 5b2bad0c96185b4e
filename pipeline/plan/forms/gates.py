"""Weights of routers: random ones, or directions towards the prompts that are to choose an expert."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

from raymerge.ops.decoders.intermediate import Intermediate
from raymerge.ops.decoders.noise import draw_normal, draw_uniform
from raymerge.ops.lazy import np
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.names import COMPUTED_BUFFER, Layers, split_name
from raymerge.pipeline.checkpoint.prompts.hidden_states import Request, is_available, measure_hidden_states
from raymerge.pipeline.checkpoint.prompts.prompts import encode_prompts
from raymerge.pipeline.checkpoint.source import PlannedTensor, Source
from raymerge.pipeline.checkpoint.tokenizer.tokenizer import TokenizerReader
from raymerge.pipeline.checkpoint.values import encode, read_rows
from raymerge.pipeline.checkpoint.views.tying import find_embedding
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.config.merge_config import Expert, Mixture
from raymerge.pipeline.errors import CheckpointError, ConfigError, MemoryLimitError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.sizes import format_memory, format_nbytes
from raymerge.pipeline.stores.inline import make_file
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Doubles = NDArray[np.float64]

ROUTER = "router"
"""Stands for a model's name where a router's weights come from no model."""
_SMALLEST_NORM = 1e-8
_NOTABLE_NBYTES = 256 * 2**20
"""Size of routers that the plan holds without counting it: a hundred experts of a large model have less."""


@dataclass(frozen=True, slots=True)
class Gates:
    """The rows of routers: one for each expert, and one for each shared expert."""

    rows: Floats
    """Weights of shape [layers, experts, hidden size]; one layer stands for all where they are the same."""
    etag: str = ""
    """Hash of what decides the rows where they are not compared themselves; empty where they are."""
    note: str = ""
    """Description of the computation, for the plan; empty where it takes nothing worth a word."""

    def make_tensor(self, name: str, layer: int, rows: slice, dtype: str) -> PlannedTensor:
        """Return some rows of a layer as a tensor that is stored in the plan, rounded to a dtype."""
        layer = min(layer, len(self.rows) - 1)
        values = self.rows[layer, rows]
        content = encode(values, dtype)
        etag = self.etag and f"{self.etag} {layer} {rows.start} {rows.stop}"
        return PlannedTensor(ROUTER, name, dtype, values.shape, make_file(content, etag), 0, len(content))


MakeGates = Callable[[], Gates]


@dataclass(frozen=True, slots=True)
class RouterBase:
    """The model whose tokenizer, embedding and layers routers are made with."""

    checkpoint: Checkpoint
    view: View
    layers: Layers
    hidden_size: int


def make_gates(
    stores: Stores, mixture: Mixture, base: RouterBase, seed: int, allowed_mem: int, *, measures: bool = True
) -> Gates:
    """Return the routers' weights.

    Args:
        stores: that have the base.
        mixture: of which experts.
        base: of the mixture.
        seed: of the merge.
        allowed_mem: of the merge, in bytes.
        measures: whether hidden states are computed; zeros stand for them in a plan that nobody carries out.

    Raises:
        CheckpointError: the base has no tokenizer or embedding for the prompts, or they do not fit.
        ConfigError: transformers is not installed, and hidden states are asked for.
        MemoryLimitError: they take more memory than is allowed.
        FetchError: a file could not be read.
    """
    experts = (*mixture.experts, *mixture.shared_experts)
    nbytes = 4 * base.layers.num_layers * len(experts) * base.hidden_size
    if nbytes > max(allowed_mem, _NOTABLE_NBYTES):
        raise MemoryLimitError(
            f"routers of {counted(len(experts), 'expert')} take {format_memory(nbytes)}, and"
            f" {format_memory(allowed_mem)} are allowed; give --memory {format_memory(nbytes)} or more"
        )
    if not mixture.needs_prompts:
        return _draw(mixture.gate_mode, len(experts), base, seed)
    texts = list(dict.fromkeys(text for e in experts for text in (*e.positive_prompts, *e.negative_prompts)))
    reader = TokenizerReader(stores, allowed_mem)
    prompts = encode_prompts(reader, stores, base.checkpoint, texts)
    embedding = base.view.find(find_embedding(base.view.names()) or "")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{base.view.ref}: no embedding of tokens is found, which routers are made with")
    last = max(token for prompt in prompts for token in prompt)
    if last >= embedding.shape[0]:
        raise CheckpointError(
            f"{base.view.ref}: its tokenizer makes token {last} of a prompt, and {embedding.name} has"
            f" {embedding.shape[0]} rows; the tokenizer belongs to another model"
        )
    if mixture.gate_mode == "cheap_embed":
        is_merged = isinstance(embedding.decoder, Intermediate)  # so that all of it is read
        etag = _hash(mixture, embedding.identity, prompts) if is_merged else ""
        if is_merged and not measures:
            return Gates(np.zeros((1, len(experts), base.hidden_size), np.float32), etag)
        rows = read_rows(stores, embedding, sorted({token for prompt in prompts for token in prompt}))
        sums = np.stack([np.sum([rows[token] for token in prompt], axis=0) for prompt in prompts])[None]
        return Gates(_aim(str(base.view.ref), experts, texts, sums, is_sum=True), etag)
    request = _make_request(stores, base, embedding, prompts, takes_mean=mixture.gate_mode == "hidden_avg")
    _check_fits(mixture, base, request, allowed_mem)
    etag, note = _identify(mixture, request), _describe(base, request)
    if not measures:
        shape = len(request.layers), len(experts), base.hidden_size
        return Gates(np.zeros(shape, np.float32), etag, note)
    states = measure_hidden_states(str(base.view.ref), request)
    aimed = _aim(str(base.view.ref), experts, texts, states.astype(np.float64), is_sum=False)
    return Gates(aimed, etag, note)


def _check_fits(mixture: Mixture, base: RouterBase, request: Request, allowed_mem: int) -> None:
    """Refuse a pass through the base that takes more memory than is allowed."""
    needed = request.projected_mem
    if needed > allowed_mem:
        raise MemoryLimitError(
            f"gate_mode: {mixture.gate_mode}: {format_memory(needed)} are needed to compute what a layer of"
            f" {base.view.ref} makes of the prompts, and {format_memory(allowed_mem)} are allowed; give --memory"
            f" {format_memory(needed)} or more, or write `gate_mode: cheap_embed`"
        )


def _describe(base: RouterBase, request: Request) -> str:
    """Return what the pass through the base reads and takes, for the plan."""
    num_tokens = sum(map(len, request.prompts))
    read = sum(source.nbytes for layer in request.layers[:-1] for source in layer.values())
    return (
        f"routers are made of the hidden states of {counted(len(request.prompts), 'prompt')}"
        f" ({counted(num_tokens, 'token')}): before the merge, transformers passes them through {base.view.ref}, which"
        f" reads {format_nbytes(read)}, a layer at a time, in {format_memory(request.projected_mem)} besides what"
        " transformers takes"
    )


def _draw(mode: str, num_rows: int, base: RouterBase, seed: int) -> Gates:
    """Return random rows: normal, or as layers begin training with."""
    draw, bound = (draw_normal, 1.0) if mode == "random" else (draw_uniform, base.hidden_size**-0.5)
    shape = num_rows, base.hidden_size
    layers = range(base.layers.num_layers)
    drawn = [draw(seed, f"router {k}", num_rows * base.hidden_size).reshape(shape) for k in layers]
    return Gates(np.stack(drawn) * np.float32(bound))


def _aim(base: str, experts: Sequence[Expert], texts: Sequence[str], vectors: Doubles, *, is_sum: bool) -> Floats:
    """Return the rows of routers: for each expert the direction from its negative prompts to its positive ones.

    Args:
        base: the model that makes the vectors.
        experts: in the order of the rows.
        texts: all of their prompts.
        vectors: of shape [layers, prompts, hidden size].
        is_sum: whether the vectors of an expert's prompts are added up, to one of length 1, or averaged.

    Raises:
        CheckpointError: a row is not finite.
    """

    def look(prompts: Sequence[str]) -> Doubles:
        if not prompts:
            return np.zeros((len(vectors), vectors.shape[2]))
        own = vectors[:, [texts.index(prompt) for prompt in prompts]]
        found: Doubles = normalize(own.sum(1)) if is_sum else own.mean(1)
        return found

    rows = [normalize(look(e.positive_prompts) - look(e.negative_prompts)) for e in experts]
    found: Floats = np.stack(rows, axis=1).astype(np.float32)
    for number, expert in enumerate(experts):
        is_finite = np.isfinite(found[:, number]).all(axis=-1)
        if not is_finite.all():
            where = "its embedding" if is_sum else f"layer {is_finite.argmin()}"
            raise CheckpointError(
                f"{base}: {where} makes NaN or infinity of the prompts of {expert.model}, and so would its router; mend"
                " the base's weights, or write `gate_mode: random`"
            )
    return found


def _make_request(
    stores: Stores, base: RouterBase, embedding: Source, prompts: Sequence[Sequence[int]], *, takes_mean: bool
) -> Request:
    if not is_available():
        raise ConfigError(
            "gate_mode: hidden takes a pass through the base, for which transformers is needed: pip install"
            " 'raymerge[moe]', or write `gate_mode: cheap_embed`"
        )
    layers: list[dict[str, Source]] = [{} for _ in range(base.layers.num_layers)]
    for name in base.view.names():
        split, source = split_name(name), base.view.find(name)
        if split and source and split.stack == base.layers.main and not name.endswith(COMPUTED_BUFFER):
            layers[split.layer][split.rest] = source
    tokens = tuple(tuple(prompt) for prompt in prompts)
    return Request(stores, base.checkpoint.config, embedding, tuple(layers), tokens, takes_mean)


def _identify(mixture: Mixture, request: Request) -> str:
    """Return a hash of what decides hidden states, but for how processors round."""
    layers = [[[name, source.identity] for name, source in layer.items()] for layer in request.layers]
    return _hash(mixture, request.config, request.embedding.identity, layers, request.prompts)


def _hash(mixture: Mixture, *content: object) -> str:
    """Return a hash of a mixture's prompts and of some JSON."""
    experts = [(e.positive_prompts, e.negative_prompts) for e in (*mixture.experts, *mixture.shared_experts)]
    return sha256(json.dumps([mixture.gate_mode, experts, *content], sort_keys=True).encode()).hexdigest()


def normalize(vectors: Doubles) -> Doubles:
    """Return vectors of length 1 in the same directions, along the last axis."""
    lengths = np.sqrt(np.square(vectors).sum(-1, keepdims=True))
    found: Doubles = vectors / np.maximum(lengths, _SMALLEST_NORM)
    return found
