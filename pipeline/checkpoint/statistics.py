"""Statistics of a model's tensors, such as the diagonal of its Fisher information: safetensors files beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from raymerge.pipeline.checkpoint.checkpoint import HUB_NAME
from raymerge.pipeline.checkpoint.files import is_hidden
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of, suggest_directory

_SUFFIX = ".safetensors"


@dataclass(frozen=True, slots=True)
class StatisticsFiles:
    """The files that hold the statistics of one model."""

    ref: ModelRef
    """As the config names them."""
    url: str
    """The directory, or the file; absolute, and at a revision that does not move."""
    files: tuple[StoredFile, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """The files, relative to `url`; none where that is the only file itself."""
        return tuple(file.url.removeprefix(f"{self.url}/") for file in self.files if file.url != self.url)


def find_statistics(
    stores: Stores, refs: Mapping[ModelRef, str], models: Mapping[str, ModelRef]
) -> list[StatisticsFiles]:
    """Return the files of each reference: a safetensors file, or all those in a directory.

    Args:
        stores: that have them.
        refs: what the config names, each with where it does, for messages.
        models: the models by their URL: statistics are not the model's own tensors.

    Raises:
        CheckpointError: there is no such file or directory, or it is a model of the merge.
        FetchError: the store refuses or is down.
    """
    found = []
    for ref, where in refs.items():
        try:
            found.append(_find(stores, ref, models))
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}" if where else str(error)) from error
    return found


def index_statistics(tensors: Sequence[StoredTensor]) -> dict[str, StoredTensor]:
    """Return tensors by name.

    Raises:
        CheckpointError: there are two of one name.
    """
    found: dict[str, StoredTensor] = {}
    for tensor in tensors:
        other = found.setdefault(tensor.name, tensor)
        if other is not tensor:
            raise CheckpointError(
                f"{tensor.model}: tensor {tensor.name!r} is in two files, {other.file.url} and {tensor.file.url};"
                " delete one"
            )
    return found


def _find(stores: Stores, ref: ModelRef, models: Mapping[str, ModelRef]) -> StatisticsFiles:
    url = _locate(stores, ref)
    storage = stores.at(url)
    if url in models:
        raise CheckpointError(
            f"{ref}: the directory of the model {models[url]} itself, whose weights are no statistics;"
            f" name the file in it, such as {ref.path}/NAME{_SUFFIX}"
        )
    if url.endswith(_SUFFIX):
        try:
            return StatisticsFiles(ref, url, (storage.stat(url),))
        except FileNotFoundError:
            raise CheckpointError(f"{ref}: there is no such file ({url}); check the name") from None
    files = {name: file for name, file in storage.list(url).items() if name.endswith(_SUFFIX) and not is_hidden(name)}
    found = tuple(file for name, file in files.items() if "/" not in name)
    if not found:
        raise CheckpointError(
            f"{ref}: there is no {_SUFFIX} file in {url}; give the directory that has some, or a file"
        )
    return StatisticsFiles(ref, url, found)


def _locate(stores: Stores, ref: ModelRef) -> str:
    storage = stores.at(ref.path)
    if scheme_of(ref.path) != "file":
        return storage.pin(ref.path, ref.revision)
    path = Path(storage.absolute(ref.path))
    if path.exists():
        return storage.pin(str(path), ref.revision)
    if HUB_NAME.fullmatch(ref.path) and not ref.path.endswith(_SUFFIX):
        return stores.at(f"hf://{ref.path}").pin(f"hf://{ref.path}", ref.revision)
    raise CheckpointError(f"{ref}: no such file or directory ({path}){suggest_directory(path)}")
