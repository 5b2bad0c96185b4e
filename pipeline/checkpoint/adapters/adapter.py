"""An adapter as it is stored: its directory, its config, its tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from raymerge.pipeline.checkpoint.adapters.config import AdapterConfig, parse_adapter_config
from raymerge.pipeline.checkpoint.checkpoint import locate_model, nothing_there
from raymerge.pipeline.checkpoint.files import ADAPTER, ADAPTER_CONFIG, is_hidden
from raymerge.pipeline.checkpoint.header import read_header
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.checkpoint.weights import read_json, read_weight_map
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import listing
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores

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
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for entry in read_header(storage, files[name], check):
            tensor = StoredTensor(str(ref), entry.name, entry.dtype, entry.shape, files[name], entry.start, entry.stop)
            if entry.name in tensors:
                raise CheckpointError(f"{url}: tensor {entry.name!r} is in two files")
            tensors[entry.name] = tensor
    if not tensors:
        raise CheckpointError(f"{url}: the adapter holds no tensors")
    return Adapter(ref, url, config, tuple(tensors.values()), files)
