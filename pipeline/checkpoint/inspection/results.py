"""Contents of a checkpoint: its files, its tensors by dtype and layer, and the config that goes with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from raymerge.pipeline.checkpoint.files import SINGLE, is_weights
from raymerge.pipeline.checkpoint.inspection.stacks import Stack, Totals, add_up, split_stacks
from raymerge.pipeline.checkpoint.manifest import Origin
from raymerge.pipeline.checkpoint.model_config import Json, count_layers
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.views.tying import find_embedding, find_head, is_tied
from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact
from raymerge.pipeline.sizes import format_nbytes

Role = Literal["weights", "other weights", "config", "side file", "other"]
"""A file's part in a merge: read, left out, read and written anew, copied, left out."""


@dataclass(frozen=True, slots=True)
class FoundFile:
    """A file of the model's directory."""

    name: str
    """Relative to the directory."""
    nbytes: int
    role: Role


@dataclass(frozen=True, slots=True)
class Inspection:
    """Contents of a checkpoint. Credentials are taken out of every URL."""

    url: str
    """The directory, or the one file, at a revision that does not move where there are any."""
    weights_format: str
    """`safetensors`, `LoRA adapter`, `GGUF`, `pickled weights`, `other weights` or `no weights`."""
    architectures: tuple[str, ...]
    """As config.json has them."""
    model_type: str
    """Empty where config.json does not say."""
    config_num_layers: int | None
    """Layers that config.json counts."""
    obstacle: str
    """Why raymerge cannot merge it; empty where nothing is known that speaks against it."""
    files: tuple[FoundFile, ...]
    """By name; hidden ones left out."""
    tensors: tuple[StoredTensor, ...]
    """In natural order of their names; each file is called by its name relative to the directory."""
    total: Totals
    dtypes: tuple[tuple[str, Totals], ...]
    """The one with most bytes first."""
    stacks: tuple[Stack, ...]
    """The main one first, then by name."""
    outside: tuple[StoredTensor, ...]
    """Tensors that are in no stack."""
    embedding: str
    """Name of the token embedding, empty where it cannot be told."""
    head: str
    """Name of the output head, empty where none is stored."""
    is_tied: bool | None
    """Whether the output head is the token embedding; None where that cannot be told."""
    made: Origin | None
    """None where raymerge did not make it."""
    read_nbytes: int
    num_reads: int
    """Ranges that were read: one of each small file, and one or two of each header."""

    @property
    def nbytes(self) -> int:
        """Size of all files together."""
        return sum(file.nbytes for file in self.files)

    def __repr__(self) -> str:
        contents = f"{counted(len(self.tensors), 'tensor')} in {counted(len(self.files), 'file')}"
        return f"Inspection({self.url}: {self.weights_format}, {contents}, {format_nbytes(self.nbytes)})"


def summarise(
    url: str,
    config: Json,
    obstacle: str,
    files: Sequence[FoundFile],
    tensors: Sequence[StoredTensor],
    made: Origin | None,
    read_nbytes: int,
    num_reads: int,
) -> Inspection:
    """Return the contents of a checkpoint, from its files, their tensors and config.json; see `Inspection`."""
    listed = config.get("architectures", [config["_class_name"]] if "_class_name" in config else None)
    architectures = tuple(str(name) for name in listed) if isinstance(listed, list) else ()
    by_dtype: defaultdict[str, list[StoredTensor]] = defaultdict(list)
    for tensor in tensors:
        by_dtype[tensor.dtype].append(tensor)
    dtypes = sorted(((dtype, add_up(each)) for dtype, each in by_dtype.items()), key=lambda item: -item[1].nbytes)
    stacks, outside = split_stacks(tensors, count_layers(config))
    names = [tensor.name for tensor in tensors]
    return Inspection(
        url=redact(url),
        weights_format=_name_format([file.name for file in files if is_weights(file.name)]),
        architectures=architectures,
        model_type=str(config.get("model_type") or ""),
        config_num_layers=count_layers(config),
        obstacle=redact(obstacle),
        files=tuple(files),
        tensors=tuple(tensors),
        total=add_up(tensors),
        dtypes=tuple(dtypes),
        stacks=stacks,
        outside=outside,
        embedding=find_embedding(names) or "",
        head=find_head(names) or "",
        is_tied=is_tied({**config, "architectures": architectures}, names)
        if config and find_embedding(names)
        else None,
        made=made,
        read_nbytes=read_nbytes,
        num_reads=num_reads,
    )


def _name_format(weights: Sequence[str]) -> str:
    """Return the kind of the files of weights."""
    if SINGLE not in weights and any(name.startswith("adapter_model.") for name in weights):
        return "LoRA adapter"
    for suffixes, what in (
        ((".safetensors",), "safetensors"),
        ((".gguf",), "GGUF"),
        ((".bin", ".pt", ".pth", ".ckpt"), "pickled weights"),
    ):
        if any(name.endswith(suffixes) for name in weights):
            return what
    return "other weights" if weights else "no weights"
