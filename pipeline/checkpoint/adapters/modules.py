"""The modules that an adapter's tensors change, told by their names."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from raymerge.pipeline.checkpoint.adapters.adapter import Adapter
from raymerge.pipeline.checkpoint.dtypes import DTYPES
from raymerge.pipeline.checkpoint.names import OTHER_SENSES
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import counted, listing

_PREFIX = "base_model.model."
_OWN_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<last>\.weight|\.bias)?"
)
_WRAPPERS = re.compile(r"\.(?:base_layer|modules_to_save(?:\.default)?)(?=\.)")
_REPOSITORY = re.compile(r"\w[\w.-]*/(\w[\w.-]*)")
_STORAGE = re.compile(r"(?:[-_.](?:unsloth|bnb|4bit|8bit|gptq|awq|int4|int8|fp8|bf16|fp16|hf))+$")
_UNKNOWN = re.compile(
    r"\.(?:lora_\w+|trainable_tokens\w*|token_adapter|hada_\w+|lokr_\w+|ia3_\w+|oft_\w+|vera_\w+|original_module)(?:\.|$)"
)

_MAX_BEGINNINGS = 16
"""Beginnings of names that are exchanged at most, and words in each: every one takes a look at all names."""


@dataclass(slots=True)
class Parts:
    """The tensors that belong to one update."""

    depth: int
    """Wrappers around the module within others: of several parameters of one module, each has its own."""
    factors: dict[str, StoredTensor] = field(default_factory=dict)
    """By `A`, `B`, `magnitude` and `bias`."""
    is_embedding: bool = False

    def get(self, name: str, adapter: Adapter, module: str) -> StoredTensor:
        """Return a factor that has to be there."""
        if name not in self.factors:
            have = next(iter(self.factors.values())).name
            raise CheckpointError(f"{adapter.url}: {module} has {have}, and no lora_{name}; the adapter is incomplete")
        return self.factors[name]


@dataclass(frozen=True, slots=True)
class Content:
    """The content of an adapter, under the names that its author's model had."""

    updates: Mapping[str, list[Parts]]
    """By module."""
    whole: Mapping[str, StoredTensor]
    """Tensors in place of the model's own, by name."""


def sort_tensors(adapter: Adapter) -> Content:
    """Return what an adapter's tensors are for.

    Raises:
        CheckpointError: the name of one has no known meaning.
    """
    updates: dict[str, dict[int, Parts]] = {}
    whole: dict[str, StoredTensor] = {}
    for tensor in adapter.tensors:
        name = tensor.name.removeprefix(_PREFIX)
        match = _OWN_PART.fullmatch(name)
        if match is None:
            if _UNKNOWN.search(name):
                raise CheckpointError(
                    f"{adapter.url}: tensor {tensor.name} has no known meaning; apply the adapter by peft"
                    " (model.merge_and_unload()), and merge the result"
                )
            if (other := whole.setdefault(_WRAPPERS.sub("", name), tensor)) is not tensor:
                raise CheckpointError(f"{adapter.url}: {other.name} and {tensor.name} are of one tensor; delete one")
            continue
        module = _WRAPPERS.sub("", f"{match['module']}.")[:-1]
        depth = match["module"].count(".base_layer")
        parts = updates.setdefault(module, {}).setdefault(depth, Parts(depth))
        parts.is_embedding |= "embedding" in match["part"]
        kind = "bias" if match["last"] == ".bias" else match["part"].rpartition("_")[2].replace("vector", "magnitude")
        if not DTYPES[tensor.dtype].is_mergeable:
            raise CheckpointError(f"{adapter.url}: {tensor.name} is {tensor.dtype}; floating-point values are needed")
        if kind in parts.factors:
            raise CheckpointError(f"{adapter.url}: {tensor.name} and {parts.factors[kind].name} are of one module")
        parts.factors[kind] = tensor
    return Content({module: list(found.values()) for module, found in updates.items()}, whole)


def describe_adapter(adapter: Adapter) -> str:
    """Return what an adapter is for: how many modules, its ranks, and the model that it was trained on.

    Raises:
        CheckpointError: the name of a tensor has no known meaning.
    """
    content = sort_tensors(adapter)
    each = [parts.factors for several in content.updates.values() for parts in several]
    ranks = {factors["A"].shape[0] for factors in each if "A" in factors and factors["A"].shape}
    of_rank = f" of rank {listing(sorted(ranks))}" if ranks else ""
    whole = f", and {counted(len(content.whole), 'tensor')} stored whole" if content.whole else ""
    trained = f", trained on {adapter.config.base!r:.200}" if adapter.config.base else ""
    return f"a LoRA adapter{of_rank} for {counted(len(content.updates), 'module')}{whole}{trained}"


def names_other_model(first: str, second: str) -> bool:
    """Tell whether two names of base models are plainly those of different repositories of the Hub.

    Copies of one model have other owners, and endings for how they are stored. Directories tell nothing.

    >>> names_other_model("Qwen/Qwen2.5-7B", "me/qwen2.5-7b-bnb-4bit"), names_other_model("org/a-7b", "org/b-7b")
    (False, True)
    """
    names = [match[1].casefold() for name in (first, second) if (match := _REPOSITORY.fullmatch(name))]
    return len({_STORAGE.sub("", name) for name in names}) == 2


def find_renaming(wanted: Collection[str], known: Collection[str]) -> dict[str, str] | None:
    """Return how names begin in an adapter, and in the model instead; None where no beginnings make all of them fit.

    Versions of transformers say `model.language_model.` for `model.` and `model.visual.` for `visual.`, and a model
    without a head has no `model.`.

    Args:
        wanted: modules and tensors, as the adapter calls them.
        known: those of the model.
    """
    missing = [name for name in wanted if name not in known]
    beginnings: dict[str, str] = {}
    while missing:
        found = _find_beginning(missing, known)
        if found is None or len(beginnings) == _MAX_BEGINNINGS:
            return None
        beginnings |= [found]
        missing = [name for name in missing if not name.startswith(found[0])]
    renamed = [rename(name, beginnings, known) for name in wanted]
    return beginnings if len({*renamed}) == len(renamed) else None


def _find_beginning(missing: list[str], known: Collection[str]) -> tuple[str, str] | None:
    """Return a beginning of the first name, and another with which all names that have it are known."""
    parts = missing[0].split(".")
    first = next((k for k, part in enumerate(parts) if part.isdigit()), len(parts) - 1)
    for start in range(min(first, _MAX_BEGINNINGS) + 1):
        suffix = ".".join(parts[start:])
        old = missing[0].removesuffix(suffix)
        alike = [name for name in missing if name.startswith(old)]
        found = {name.removesuffix(suffix) for name in known if name == suffix or name.endswith(f".{suffix}")}
        found = {new for new in found if bool(OTHER_SENSES.search(new)) == bool(OTHER_SENSES.search(old))}
        fitting = [new for new in sorted(found) if all(new + name.removeprefix(old) in known for name in alike)]
        if len(fitting) == 1:
            return old, fitting[0]
    return None


def rename(name: str, beginnings: Mapping[str, str], known: Collection[str]) -> str:
    """Return a model's name for a module or tensor: the same, or with one of these beginnings exchanged."""
    old = max((old for old in beginnings if name.startswith(old)), key=len, default="")
    return name if name in known or old not in beginnings else beginnings[old] + name.removeprefix(old)


def list_modules(names: Iterable[str]) -> set[str]:
    """Return the names of tensors and of the modules that they are in.

    >>> sorted(list_modules(["a.b.weight"]))
    ['a.b', 'a.b.weight']
    """
    found = set(names)
    return found | {name.rpartition(".")[0] for name in found}
