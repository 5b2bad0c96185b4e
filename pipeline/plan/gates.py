"""Weights of routers: random ones, or directions in which the texts lie that are to choose an expert."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.ops.decoder import Raw
from raymerge.ops.lazy import np, torch
from raymerge.ops.noise import draw_normal, draw_uniform
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.prompts import encode_prompts
from raymerge.pipeline.checkpoint.source import PlannedTensor, Source, StoredTensor
from raymerge.pipeline.checkpoint.tying import find_embedding
from raymerge.pipeline.checkpoint.views import View
from raymerge.pipeline.config.merge_config import Mixture
from raymerge.pipeline.errors import CheckpointError, ConfigError
from raymerge.pipeline.stores.inline import make_file
from raymerge.pipeline.stores.open import Stores

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]
    Vector = NDArray[np.float64]

ROUTER = "router"
"""Stands for a model's name where a router's weights come from no model."""
_SMALLEST_NORM = 1e-8


@dataclass(frozen=True, slots=True)
class Gates:
    """The rows of routers: one for each expert, and one for each shared expert."""

    rows: Floats
    """Of shape [layers, experts, hidden size]; one layer stands for all where they are the same."""
    etag: str = ""
    """What decides them, where it is not they themselves."""

    def make_tensor(self, name: str, layer: int, rows: slice, dtype: str) -> PlannedTensor:
        """Return some rows of a layer as a tensor that is stored in the plan, rounded to a dtype."""
        layer = min(layer, len(self.rows) - 1)
        values = self.rows[layer, rows]
        content = encode(values, dtype)
        etag = self.etag and f"{self.etag} {layer} {rows.start} {rows.stop}"
        return PlannedTensor(ROUTER, name, dtype, values.shape, make_file(content, etag), 0, len(content))


def make_gates(
    stores: Stores, mixture: Mixture, checkpoint: Checkpoint, base: View, num_layers: int, hidden_size: int, seed: int
) -> Gates:
    """Return the routers' weights.

    Args:
        stores: that have the base.
        mixture: of which experts.
        checkpoint: of the base.
        base: as it is seen.
        num_layers: of the base.
        hidden_size: of the base.
        seed: of the merge.

    Raises:
        CheckpointError: the base has no tokenizer or embedding for the prompts.
        FetchError: a file could not be read.
    """
    experts = (*mixture.experts, *mixture.shared_experts)
    if not mixture.needs_prompts:
        draw = draw_normal if mixture.gate_mode == "random" else draw_uniform
        bound = np.float32(1.0 if mixture.gate_mode == "random" else 1 / np.sqrt(np.float64(hidden_size)))
        shape = len(experts), hidden_size
        layers = range(num_layers)
        drawn = [draw(seed, f"router {k}", len(experts) * hidden_size).reshape(shape) for k in layers]
        return Gates(np.stack(drawn) * bound)
    if mixture.gate_mode != "cheap_embed":
        raise ConfigError(
            f"gate_mode: {mixture.gate_mode} is not supported yet; write `cheap_embed`, which takes embeddings alone"
        )
    prompts = dict.fromkeys(text for e in experts for text in (*e.positive_prompts, *e.negative_prompts))
    ids = dict(zip(prompts, encode_prompts(stores, checkpoint, list(prompts)), strict=True))
    embedding = base.find(find_embedding(base.names()) or "")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{base.ref}: no embedding of tokens is found, which routers are made with")
    rows = _read_rows(stores, embedding, sorted({token for tokens in ids.values() for token in tokens}))

    def look(texts: Sequence[str]) -> Vector:
        """Return the direction of the sum of all tokens of some texts."""
        total: Vector = np.zeros(embedding.shape[1], np.float64)
        for text in texts:
            for token in ids[text]:
                total += rows[token]
        return normalize(total)

    found = [normalize(look(e.positive_prompts) - look(e.negative_prompts)) for e in experts]
    return Gates(np.stack(found)[None].astype(np.float32))


def normalize(vector: Vector) -> Vector:
    """Return a vector of length 1 in the same direction."""
    return vector / max(float(np.sqrt(np.square(vector).sum())), _SMALLEST_NORM)


def encode(values: Floats, dtype: str) -> bytes:
    """Return float32 values as stored in a dtype, rounded to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values).view(np.uint32).astype(np.uint64)
        return bytes(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").tobytes())
    return bytes(values.astype(np.dtype(DTYPES[dtype].torch_name).newbyteorder("<")).tobytes())


def decode(content: bytes, dtype: str) -> Vector:
    """Return the values that are stored in a dtype."""
    if dtype == "BF16":
        return (np.frombuffer(content, "<u2").astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return np.frombuffer(content, np.dtype(DTYPES[dtype].torch_name).newbyteorder("<")).astype(np.float64)


def _read_rows(stores: Stores, embedding: Source, tokens: Sequence[int]) -> dict[int, Vector]:
    """Return some rows of an embedding, and read no others."""
    num_rows, width = embedding.shape
    if tokens[-1] >= num_rows:
        raise CheckpointError(
            f"{embedding.model}: its tokenizer makes token {tokens[-1]} of a prompt, and {embedding.name} has"
            f" {num_rows} rows; the tokenizer belongs to another model"
        )
    pieces = [embedding.ranges(token * width, (token + 1) * width) for token in tokens]
    contents = iter(stores.read_ranges([piece for found in pieces for piece in found]))
    if isinstance(embedding, StoredTensor):
        return {token: decode(next(contents), embedding.dtype) for token in tokens}
    rows = {}
    for token, found in zip(tokens, pieces, strict=True):
        content = [torch.frombuffer(bytearray(next(contents)), dtype=torch.uint8) for _ in found]
        start, stop = token * width, (token + 1) * width
        values = embedding.decoder.decode(Raw(content, start, stop), start, stop, torch.empty(width))
        rows[token] = values.double().numpy()
    return rows
