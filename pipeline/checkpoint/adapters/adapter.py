"""An adapter as it is stored: its directory, its config, its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from raymerge.pipeline.checkpoint.adapters.config import AdapterConfig, parse_adapter_config
from raymerge.pipeline.checkpoint.adapters.of_pipelines import PIPELINE_ADAPTER, read_scales, split_components
from raymerge.pipeline.checkpoint.checkpoint import Checkpoint, locate_model, nothing_there
from raymerge.pipeline.checkpoint.files import ADAPTER, ADAPTER_CONFIG, is_hidden
from raymerge.pipeline.checkpoint.header import read_header, read_metadata
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.weights import read_json, read_weight_map
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage

_INDEX = "adapter_model.safetensors.index.json"
_PICKLED = "adapter_model.bin"
_NUM_READERS = 16
"""Far stores take a while to answer; so many answers can be waited for at once."""
_MAX_CONFIG_NBYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter."""

    ref: ModelRef
    url: str
    """The directory that holds its files, at a revision that does not move where there are any."""
    config: AdapterConfig
    tensors: tuple[StoredTensor, ...]
    """In the order of the files."""
    files: Mapping[str, StoredFile]
    """All that is in the directory, by relative name; hidden files left out."""
    components: Mapping[str, Adapter] = field(default_factory=dict)
    """Adapters for the components of a pipeline, by their prefix; empty for other models."""
    scales: Mapping[str, float] | None = None
    """Scales of the modules' products of factors, where they are not 1, for want of a config."""

    def find_component(self, pipeline: Checkpoint, prefix: str) -> Adapter | None:
        """Return the adapter for a network: itself for a model, that for a component or None for a pipeline.

        Args:
            pipeline: the model or pipeline that it is named with.
            prefix: of the component; empty for a model.

        Raises:
            CheckpointError: it is one for a pipeline, and that is a model, or the other way round, or a component that
                it changes is not there.
        """
        if bool(self.components) != bool(pipeline.components):
            kinds = ("a diffusion pipeline", "a single network")
            ours, theirs = kinds if self.components else kinds[::-1]
            raise CheckpointError(
                f"{self.url}: an adapter for {ours}, and {pipeline.model.without_adapter} is {theirs}"
            )
        if not prefix:
            return self
        there = {part.prefix for part in pipeline.networks}
        if missing := [name[:-1] for name in self.components if name not in there]:
            raise CheckpointError(
                f"{self.url}: the adapter changes {listing(missing)}, which {pipeline.model.without_adapter} does not"
                f" have, among {listing(sorted(name[:-1] for name in there))}"
            )
        return self.components.get(prefix)

    def __repr__(self) -> str:
        return f"Adapter({self.ref}, rank {self.config.rank})"


def open_adapters(
    stores: Stores,
    refs: Iterable[ModelRef],
    check: Callable[[StoredFile, int], None] = lambda file, num_tensors: None,
) -> dict[ModelRef, Adapter]:
    """Return each adapter once; see `open_adapter`."""
    each = list(dict.fromkeys(refs))
    if not each:
        return {}
    with ThreadPoolExecutor(_NUM_READERS) as pool:
        return dict(zip(each, pool.map(lambda ref: open_adapter(stores, ref, check), each), strict=True))


def open_adapter(
    stores: Stores, ref: ModelRef, check: Callable[[StoredFile, int], None] = lambda file, num_tensors: None
) -> Adapter:
    """Read an adapter's config and the headers of its tensors.

    Args:
        stores: that have it.
        ref: which it is.
        check: called with each file and the number of tensors that its header seems to have, before it is parsed.

    Raises:
        CheckpointError: there is none, or it is malformed, pickled, or of a kind that cannot be merged.
        FetchError: the store refuses or is down.
    """
    url = locate_model(stores, ref)
    storage = stores.at(url)
    files = {name: file for name, file in storage.list(url).items() if not is_hidden(name)}
    if not files:
        raise nothing_there(storage, url)
    if ADAPTER_CONFIG not in files and PIPELINE_ADAPTER in files:
        return _open_pipeline_adapter(stores, ref, url, files, check)
    if ADAPTER_CONFIG not in files:
        what = "a whole model; name it as `model:`" if "config.json" in files else f"{listing(files)} is there"
        raise CheckpointError(
            f"{url}: no {ADAPTER_CONFIG}; a LoRA adapter is a directory with {ADAPTER_CONFIG} and {ADAPTER}, as peft"
            f" saves it, and this is {what}"
        )
    config = parse_adapter_config(
        read_json(storage, f"{url}/{ADAPTER_CONFIG}", _MAX_CONFIG_NBYTES), f"{url}/{ADAPTER_CONFIG}"
    )
    if ADAPTER in files:
        names = [ADAPTER]
    elif _INDEX in files:
        names = sorted(set(read_weight_map(storage, f"{url}/{_INDEX}").values()))
        if missing := [name for name in names if name not in files]:
            raise CheckpointError(f"{url}: {listing(missing)} missing, which {_INDEX} names")
    elif _PICKLED in files:
        raise CheckpointError(
            f"{url}: only {_PICKLED}, which can run code when it is loaded; if you trust it, convert it to safetensors:"
            ' python -c "import torch; from safetensors.torch import save_file;'
            f" save_file(torch.load('{_PICKLED}', weights_only=True), '{ADAPTER}')\""
        )
    else:
        raise CheckpointError(f"{url}: no {ADAPTER}; {storage.advise_download(url)}")
    tensors = _read_tensors(storage, ref, url, [files[name] for name in names], check)
    return Adapter(ref, url, config, tensors, files)


def _open_pipeline_adapter(
    stores: Stores,
    ref: ModelRef,
    url: str,
    files: Mapping[str, StoredFile],
    check: Callable[[StoredFile, int], None],
) -> Adapter:
    """Return an adapter for a pipeline, with one for each component."""
    file = files[PIPELINE_ADAPTER]
    storage = stores.at(url)
    tensors = _read_tensors(storage, ref, url, [file], check)
    metadata = read_metadata(storage, file)
    components = {}
    for prefix, (own, config, is_stated) in split_components(tensors, metadata, file.url).items():
        scales = read_scales(stores, own, is_stated=is_stated)
        factors = tuple(tensor for tensor in own if not tensor.name.endswith(".alpha"))
        components[prefix] = Adapter(ref, url, config, factors, files, scales=scales)
    return Adapter(ref, url, next(iter(components.values())).config, tensors, files, components)


def _read_tensors(
    storage: Storage,
    ref: ModelRef,
    url: str,
    files: Iterable[StoredFile],
    check: Callable[[StoredFile, int], None],
) -> tuple[StoredTensor, ...]:
    """Return the tensors of an adapter's files, which are in one of them each."""
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for entry in read_header(storage, file, check):
            tensor = StoredTensor(str(ref), entry.name, entry.dtype, entry.shape, file, entry.start, entry.stop)
            if entry.name in tensors:
                raise CheckpointError(f"{url}: tensor {entry.name!r} is in two files")
            tensors[entry.name] = tensor
    if not tensors:
        raise CheckpointError(f"{url}: the adapter holds no tensors")
    return tuple(tensors.values())
