"""Extracts a LoRA adapter from a fine-tune: the differences from its base, layer by layer, as factors of low rank."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO

import re2
import torch

from raymerge.ops.decoders.factors import factorise
from raymerge.pipeline.checkpoint.adapters.adapter import open_adapters
from raymerge.pipeline.checkpoint.adapters.written import PREFIX, dump_adapter_config
from raymerge.pipeline.checkpoint.checkpoint import resolve_models
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.files import ADAPTER, ADAPTER_CONFIG
from raymerge.pipeline.checkpoint.header import make_header
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.table import index_tensors, list_tensors, read_table
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import parse_model_ref
from raymerge.pipeline.errors import CheckpointError, ConfigError, OutputError
from raymerge.pipeline.extraction.differences import Kind, Pair, is_changed, pair_tensors, read_differences, read_values
from raymerge.pipeline.messages import counted, listing
from raymerge.pipeline.output.journal import LOCK
from raymerge.pipeline.patterns import compile_pattern
from raymerge.pipeline.plan.forms.form import Model
from raymerge.pipeline.plan.recipe import open_model
from raymerge.pipeline.stores.open import Stores, open_stores
from raymerge.pipeline.stores.seam import Lock
from raymerge.pipeline.stores.settings import Library, StoreSettings

_KEPT_ELEMENTS = 2**26
"""Differences with no more elements are read once, and kept; larger ones are read for each look at them."""
_COPY_NBYTES = 8 * 2**20


@dataclass(frozen=True, slots=True)
class Extracted:
    """The extraction of one tensor that differs."""

    name: str
    rank: int
    """Rank of its factors; 0 where it is stored whole."""
    error: float
    """Norm of what the factors miss, as a share of the norm of the difference."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """A finished adapter."""

    out: str
    nbytes: int
    """Size of its tensors' file."""
    tensors: tuple[Extracted, ...]
    num_unchanged: int
    """Tensors that are the same in both models."""


@dataclass(frozen=True, slots=True)
class _Stored:
    """A tensor of the adapter, before the file is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    """Its first byte in the spool."""
    nbytes: int


def extract_lora(
    model: str,
    base: str,
    out: str | Path,
    *,
    rank: int = 64,
    energy: float = 1.0,
    with_embeddings: bool = False,
    exclude: Sequence[str] = (),
    dtype: str = "float32",
    storage: Library = "auto",
    on_tensor: Callable[[Extracted], None] = lambda extracted: None,
) -> Extraction:
    """Write a LoRA adapter that approximates a fine-tune when it is applied to its base.

    Linear layers that differ get factors; norms, embeddings and head that differ are stored whole (`modules_to_save`),
    and so are biases. Memory: a few blocks of a tensor, and the directions of one matrix.

    Args:
        model: the fine-tune, as a config names models.
        base: what it was made from.
        out: directory or URL of the adapter.
        rank: the most that factors have.
        energy: share of each difference's sum of squares to keep; fewer ranks are taken where they have it.
        with_embeddings: whether embedding and head get factors as well.
        exclude: regular expressions; tensors whose names match one stay as they are in the base.
        dtype: of the factors: float32, bfloat16 or float16.
        storage: what serves object stores and the web.
        on_tensor: told of each tensor that differs, when it is done.

    Raises:
        ConfigError: an argument is none of what is possible.
        CheckpointError: a model cannot be read, or is quantised.
        TensorMismatchError: the two are not a fine-tune and its base.
        OutputError: there is an adapter already, or it cannot be written.
    """
    _check_settings(rank, energy, dtype)
    patterns = [_compile(pattern) for pattern in exclude]
    with open_stores(StoreSettings(storage)) as stores, tempfile.TemporaryFile(prefix="raymerge-") as spool:
        target = stores.at(str(out)).absolute(str(out))
        stores.at(target).check_space(target, 0)  # says so where nothing can be written at all
        there = [name for name in stores.at(target).list(target) if name in (ADAPTER, ADAPTER_CONFIG)]
        if there:
            raise OutputError(f"{target}: {listing(there)} is there already; choose another directory, or delete it")
        tuned, origin = _open_models(stores, [model, base])
        pairs = pair_tensors(tuned, origin, with_embeddings=with_embeddings)
        writer = _Writer(spool, getattr(torch, dtype))
        found: list[Extracted] = []
        whole: list[str] = []
        for pair in pairs:
            if any(pattern.search(pair.name) for pattern in patterns) or not is_changed(stores, pair):
                continue
            extracted = _extract(stores, pair, rank, energy, writer)
            if not extracted.rank:
                whole.append(pair.name)
            found.append(extracted)
            on_tensor(extracted)
        if not found:
            raise CheckpointError(f"{model} and {base} have the same tensors: there is nothing to extract")
        whole += _complete(stores, pairs, whole, writer)
        writer.wrap_biases({item.name.removesuffix(".weight") for item in found if item.rank})
        ranks = {item.name.removesuffix(".weight"): item.rank for item in found if item.rank}
        is_turned = any(pair.kind is Kind.TURNED for pair in pairs)
        config = dump_adapter_config(base, ranks, whole, is_turned=is_turned)
        with stores.at(target).lock(f"{target}/{LOCK}", restart=True) as lock:  # makes a repository that is not there
            nbytes = _write(stores, target, writer, config, lock)
    return Extraction(str(out), nbytes, tuple(found), len(pairs) - len(found))


def _check_settings(rank: int, energy: float, dtype: str) -> None:
    if rank < 1:
        raise ConfigError(f"--rank is {rank}; it must be 1 or more")
    if not 0 < energy <= 1:
        raise ConfigError(f"--energy is {energy:g}; it must be a share above 0, and at most 1")
    if dtype not in ("float32", "bfloat16", "float16"):
        raise ConfigError(f"--dtype is {dtype!r}; float32, bfloat16 or float16 is needed")


def _open_models(stores: Stores, names: Sequence[str]) -> list[Model]:
    refs = [parse_model_ref(Place(name, path)) for name, path in zip(names, ("MODEL", "BASE"), strict=True)]
    adapters = open_adapters(stores, [ref.adapter for ref in refs if ref.adapter])
    models = []
    for checkpoint in resolve_models(stores, refs):
        if checkpoint.components:
            raise CheckpointError(
                f"{checkpoint.model}: a diffusers pipeline; name the directory of one component, in both models"
            )
        table = read_table(stores, {str(checkpoint.model): checkpoint.weight_files})
        tensors, _ = index_tensors(checkpoint, list_tensors(table).get(str(checkpoint.model), ()))
        ref: ModelRef = checkpoint.model
        adapter = adapters[ref.adapter].find_component(checkpoint, "") if ref.adapter else None
        model = open_model(checkpoint, tensors, adapter=adapter)
        if why := model.quantisation.explain():
            raise CheckpointError(f"{ref}: {why}")
        models.append(model)
    return models


class _Writer:
    """Keeps the adapter's tensors in a file until all are known."""

    def __init__(self, spool: IO[bytes], dtype: torch.dtype) -> None:
        self.spool = spool
        self.dtype = dtype
        self.tensors: list[_Stored] = []
        self._names = {dtype.torch_name: dtype.name for dtype in DTYPES.values()}

    def add(self, name: str, shape: tuple[int, ...], blocks: Iterable[torch.Tensor], dtype: torch.dtype) -> None:
        """Append a tensor, from its values in float32."""
        start = self.spool.tell()
        for block in blocks:
            self.spool.write(block.to(dtype).contiguous().view(torch.uint8).numpy().data)
        kind = self._names[str(dtype).removeprefix("torch.")]
        self.tensors.append(_Stored(PREFIX + name, kind, shape, start, self.spool.tell() - start))

    def wrap_biases(self, modules: Collection[str]) -> None:
        """Name the biases of modules that have factors as peft does, which wraps these modules."""
        for position, stored in enumerate(self.tensors):
            module, _, last = stored.name.rpartition(".")
            if last == "bias" and module.removeprefix(PREFIX) in modules:
                self.tensors[position] = replace(stored, name=f"{module}.base_layer.bias")


def _extract(stores: Stores, pair: Pair, rank: int, energy: float, writer: _Writer) -> Extracted:
    """Add one tensor that differs to the adapter."""
    if pair.kind is not Kind.WHOLE:
        rows, columns = pair.tuned.shape
        kept = [*_read_finite(stores, pair)] if rows * columns <= _KEPT_ELEMENTS else None
        factors = factorise(lambda: iter(kept or _read_finite(stores, pair)), rows, columns, rank, energy)
        assert factors is not None
        if pair.kind is Kind.EMBEDDING:
            parts = {"lora_embedding_A": factors.left.T, "lora_embedding_B": factors.right.T}
        elif pair.kind is Kind.TURNED:
            parts = {"lora_A.weight": factors.left.T, "lora_B.weight": factors.right.T}
        else:
            parts = {"lora_A.weight": factors.right, "lora_B.weight": factors.left}
        for part, values in parts.items():
            shape = (int(values.shape[0]), int(values.shape[1]))
            writer.add(f"{pair.module}.{part}", shape, [values], writer.dtype)
        return Extracted(pair.name, factors.rank, factors.error)
    _store_whole(stores, pair, writer)
    return Extracted(pair.name, 0, 0.0)


def _read_finite(stores: Stores, pair: Pair) -> Iterator[torch.Tensor]:
    for block in read_differences(stores, pair):
        if not bool(block.isfinite().all()):
            raise CheckpointError(
                f"{pair.name} holds NaN or infinity in {pair.tuned.model} or {pair.base.model}, and no factors give"
                " those; leave it out by --exclude, or train again from a model without them"
            )
        yield block


def _store_whole(stores: Stores, pair: Pair, writer: _Writer) -> None:
    if not DTYPES[pair.tuned.dtype].is_mergeable:
        raise CheckpointError(
            f"{pair.name} differs and is {pair.tuned.dtype}: no adapter holds such tensors; leave it out by --exclude"
        )
    dtype = getattr(torch, DTYPES[pair.tuned.dtype].torch_name)
    writer.add(pair.name, pair.tuned.shape, read_values(stores, pair.tuned), dtype)


def _complete(stores: Stores, pairs: Sequence[Pair], whole: Sequence[str], writer: _Writer) -> list[str]:
    """Store the other tensors of modules that are stored whole: peft loads a whole module or nothing."""
    modules = {name.rpartition(".")[0] for name in whole if not name.endswith(".bias")}
    missing = [pair for pair in pairs if pair.name.rpartition(".")[0] in modules and pair.name not in whole]
    for pair in missing:
        _store_whole(stores, pair, writer)
    return [pair.name for pair in missing]


def _write(stores: Stores, target: str, writer: _Writer, config: str, lock: Lock) -> int:
    """Write the adapter's files, the config last; return the size of the larger one."""
    storage = stores.at(target)
    ordered = sorted(writer.tensors, key=lambda stored: -DTYPES[stored.dtype].num_bits)
    header = make_header([(stored.name, stored.dtype, stored.shape, stored.nbytes) for stored in ordered])
    nbytes = len(header) + sum(stored.nbytes for stored in ordered)
    storage.check_space(target, nbytes)
    file = storage.open_writer(f"{target}/{ADAPTER}", nbytes, exclusive=True)
    try:
        file.write(header)
        for stored in ordered:
            writer.spool.seek(stored.start)
            for start in range(0, stored.nbytes, _COPY_NBYTES):
                file.write(writer.spool.read(min(_COPY_NBYTES, stored.nbytes - start)))
    except BaseException:
        file.abort()
        raise
    lock.check()
    file.commit()
    storage.write(f"{target}/{ADAPTER_CONFIG}", config.encode(), exclusive=True)
    storage.publish(target, f"Extracted a LoRA adapter of {counted(len(ordered), 'tensor')}")
    return nbytes


def _compile(pattern: str) -> re2.Pattern:
    try:
        return compile_pattern(pattern)
    except ValueError as error:
        raise ConfigError(f"--exclude {pattern!r}: {error}") from error
