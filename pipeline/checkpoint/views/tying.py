"""Output heads that share their matrix with the embedding."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence

from raymerge.pipeline.checkpoint.model_config import Json, ties_embeddings
from raymerge.pipeline.checkpoint.names import split_name
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.stores.files import ByteRange
from raymerge.pipeline.stores.open import Stores

_HEADS = ("lm_head.weight", "embed_out.weight", "cls.predictions.decoder.weight")
_PROJ_OUT = "proj_out.weight"
"""A head if there is nothing before it: blocks of image models end in one, too."""
_WITH_PROJ_OUT = ("whisper", "moonshine")
"""Models whose head is called so, by model_type."""
_EMBEDDINGS = (
    "embed_tokens.weight",
    "wte.weight",
    "word_embeddings.weight",
    "tok_embeddings.weight",
    "embed_in.weight",
)
_HEADLESS = re.compile(r"(Classification|QuestionAnswering|(?<!Head)(?<!Heads)Model)$")
_SAMPLE_NBYTES = 2**15
_NUM_SAMPLES = 256


def find_head(names: Iterable[str]) -> str | None:
    """Return the name of a checkpoint's output head, if it is among its tensors."""
    return next(filter(is_head, names), None)


def is_head(name: str) -> bool:
    """Tell by its name whether a tensor is an output head.

    >>> [is_head(name) for name in ("model.lm_head.weight", "proj_out.weight", "vqmodel.mid.attn_1.proj_out.weight")]
    [True, True, False]
    """
    return (name.endswith(_HEADS) and split_name(name) is None) or name == _PROJ_OUT


def find_embedding(names: Iterable[str]) -> str | None:
    """Return the name of a checkpoint's token embedding, if it can be told by its name."""
    found = [name for name in names if name.endswith(_EMBEDDINGS) and split_name(name) is None]
    return found[0] if len(found) == 1 else None


def name_head(embedding: str, model_type: object = None) -> str:
    """Return the name of the head for a checkpoint whose head was its embedding.

    Args:
        embedding: its name.
        model_type: of the checkpoint, as config.json states it.

    >>> name_head("model.embed_tokens.weight"), name_head("gpt_neox.embed_in.weight")
    ('lm_head.weight', 'embed_out.weight')
    """
    if model_type in _WITH_PROJ_OUT:
        return _PROJ_OUT
    if embedding.endswith("embed_in.weight"):
        return "embed_out.weight"
    return "language_model.lm_head.weight" if embedding.startswith("language_model.") else "lm_head.weight"


def is_headless(config: Json) -> bool:
    """Tell whether an architecture has no output head, whatever config.json says of tying it."""
    architectures = config.get("architectures")
    known = architectures if isinstance(architectures, list) else []
    return any(_HEADLESS.search(str(name)) for name in known)


def is_tied(config: Json, names: Collection[str], *, has_own_head: bool = False) -> bool:
    """Return whether a checkpoint's head is its embedding.

    Where config.json is silent, its default depends on the architecture, but a checkpoint that needs a head of its own
    has one stored.

    Args:
        config: its config.json.
        names: of its tensors.
        has_own_head: whether a stored head has other values than the embedding, whatever config.json says.
    """
    if find_embedding(names) is None or is_headless(config):
        return False
    stated = ties_embeddings(config)
    if find_head(names) is None:
        return stated is not False
    return stated is True and not has_own_head


def has_own_head(stores: Stores, config: Json, tensors: Mapping[str, StoredTensor]) -> bool:
    """Return whether config.json says that the head is the embedding, and a head of other values is stored.

    transformers 5 then uses the stored one (`PreTrainedModel.tie_weights`). At most 8 MiB of each are compared, evenly
    spread with both ends among them: training changes a head everywhere.

    Raises:
        FetchError: the file could not be read.
    """
    head, embedding = (tensors.get(find(tensors) or "") for find in (find_head, find_embedding))
    if head is None or embedding is None or not ties_embeddings(config) or is_headless(config):
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    num_steps = -(-head.nbytes // _SAMPLE_NBYTES)
    steps = sorted({k * max(0, num_steps - 1) // (_NUM_SAMPLES - 1) for k in range(_NUM_SAMPLES)})
    parts = [(k * _SAMPLE_NBYTES, min(head.nbytes, (k + 1) * _SAMPLE_NBYTES)) for k in steps]
    found = (_read(stores, head, some) != _read(stores, embedding, some) for some in (parts[:1], parts[1:]) if some)
    return any(found)


def _read(stores: Stores, tensor: StoredTensor, parts: Sequence[tuple[int, int]]) -> tuple[bytes, ...]:
    """Return some parts of a stored tensor, each the bytes [start, stop)."""
    ranges = [ByteRange(tensor.file, tensor.start + start, tensor.start + stop) for start, stop in parts]
    return stores.read_ranges(ranges)
