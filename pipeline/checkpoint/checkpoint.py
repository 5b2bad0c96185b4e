"""Input checkpoints: which files a model consists of, before any tensor is looked at."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from raymerge.pipeline.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    INDEX,
    PIPELINE,
    SINGLE,
    check_name,
    is_adapter,
    is_hidden,
)
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.weights import EXPLICIT, explain_no_weights, find_weights, read_json, stem_of
from raymerge.pipeline.errors import AdapterGivenError, CheckpointError, FetchError
from raymerge.pipeline.messages import counted
from raymerge.pipeline.redact import redact, redact_values
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.stores.seam import Storage
from raymerge.pipeline.urls import is_url, scheme_of, suggest_directory

_MAX_CONFIG_NBYTES = 16 * 2**20
HUB_NAME = re.compile(r"(?!(?:models|datasets|spaces)/)[\w-][\w.-]*/[\w-][\w.-]*")
"""A model in a config that is no directory here is a repository if it looks like this."""

_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
"""Directories of repositories in the Hub's cache."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One model's files."""

    model: ModelRef
    url: str
    """The directory that holds them; absolute, and at a revision that does not move."""
    config: dict[str, Any]
    """config.json, parsed; without credentials, and without what names files of weights. Of a pipeline,
    model_index.json."""
    weight_files: tuple[StoredFile, ...]
    """The safetensors files that hold the tensors, by name."""
    files: Mapping[str, StoredFile]
    """All that is in the directory, by relative name; hidden files left out."""
    index: str = ""
    """The index file that names the weight files; empty where there is none, or it is ignored."""
    weight_map: Mapping[str, str] | None = None
    """Tensor to file name as in that index; None where there is none."""
    trusts_headers: bool = False
    """Whether the headers decide where they and the index disagree."""
    warnings: tuple[str, ...] = ()
    stem: str = "model"
    """Stem of the files of weights, before the number of a shard."""
    prefix: str = ""
    """Directory of a pipeline's component and a slash, with which the names of its tensors begin; else empty."""
    components: tuple[Checkpoint, ...] = ()
    """The components of a diffusers pipeline, in the order of model_index.json; none of a model. Those without weights,
    such as a scheduler, have no config."""

    @property
    def root(self) -> str:
        """The directory of the whole: of the pipeline, where this is a component of one."""
        return self.url.removesuffix(f"/{self.prefix[:-1]}") if self.prefix else self.url

    @property
    def networks(self) -> tuple[Checkpoint, ...]:
        """The components that have weights."""
        return tuple(component for component in self.components if component.weight_files)

    def as_model(self, model: ModelRef) -> Checkpoint:
        """Return the same files as another model's, such as one with an adapter."""
        return replace(self, model=model, components=tuple(part.as_model(model) for part in self.components))

    def __repr__(self) -> str:
        return f"Checkpoint({self.model}: {counted(len(self.weight_files), 'file')} of weights in {redact(self.url)})"


def is_repository(name: str) -> bool:
    """Tell whether a model of a config is one of the Hub's, and not a directory here."""
    return HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def resolve_models(
    stores: Stores, models: Iterable[ModelRef], *, trust_headers: bool = False
) -> tuple[Checkpoint, ...]:
    """Return each model's checkpoint, in the order given; that of a model with an adapter is the model's own.

    Raises:
        CheckpointError: as for `resolve_model`.
    """
    models = tuple(models)
    alone = dict.fromkeys(model.without_adapter for model in models)
    found = {model: resolve_model(stores, model, trust_headers=trust_headers) for model in alone}
    return tuple(found[model.without_adapter].as_model(model) for model in models)


def resolve_model(stores: Stores, model: ModelRef, *, trust_headers: bool = False) -> Checkpoint:
    """Find a model's files and read its config.json and its index; of a diffusers pipeline, those of each component.

    Args:
        stores: that have it.
        model: which it is.
        trust_headers: whether the files of weights decide where they and the index disagree, or it is missing.

    Raises:
        CheckpointError: there is no such directory, a file is missing, malformed or a link out of the directory, or the
            weights are of a kind that cannot be merged.
        FetchError: the store refuses or is down.
    """
    url = locate_model(stores, model)
    storage = stores.at(url)
    files = {name: file for name, file in storage.list(url).items() if not is_hidden(name)}
    if not files:
        raise nothing_there(storage, url)
    if PIPELINE in files and not {SINGLE, INDEX}.intersection(files):
        return _resolve_pipeline(stores, model, url, files, trust_headers=trust_headers)
    if CONFIG not in files:
        if ADAPTER_CONFIG in files:
            raise AdapterGivenError(explain_no_weights(storage, url, files).args[0])
        if any(is_adapter(name) or name.endswith(".gguf") for name in files):
            raise explain_no_weights(storage, url, files)
        cached = _CACHED.fullmatch(PurePosixPath(url).name)
        hint = f"; this is a folder of the Hub's cache: write {cached[1]}/{cached[2]}" if cached else ""
        if part := storage.explain_part(url):
            hint = f"; {part}"
        raise CheckpointError(f"{url}: no {CONFIG}; a model is a directory with {CONFIG} and safetensors files{hint}")
    if not is_url(url):
        check_links(Path(url), [CONFIG])
    return _read_model(stores, model, url, files, _warn_of_revision(model, url), trust_headers=trust_headers)


def _warn_of_revision(model: ModelRef, url: str) -> list[str]:
    if model.revision is None or is_url(url):
        return []
    return [
        f"{url} is a directory, and a directory has no revisions; it is taken as it is, as in mergekit: leave"
        f" `@{model.revision}` out"
    ]


def _read_model(
    stores: Stores,
    model: ModelRef,
    url: str,
    files: Mapping[str, StoredFile],
    warnings: Iterable[str] = (),
    prefix: str = "",
    *,
    trust_headers: bool,
) -> Checkpoint:
    """Read config.json and index of a model, or of a component of a pipeline.

    Args:
        stores: that have it.
        model: which it is, or the pipeline.
        url: the directory that holds the files.
        files: all that is there.
        warnings: that are known already.
        prefix: see `Checkpoint`.
        trust_headers: see `resolve_model`.
    """
    storage = stores.at(url)
    stored = read_json(storage, f"{url}/{CONFIG}", _MAX_CONFIG_NBYTES)
    config = redact_values(stored)
    credentials = [] if config == stored else [f"{CONFIG} holds a credential, which no output gets"]
    weights = find_weights(storage, url, files, config, trust_headers=trust_headers)
    config.pop(EXPLICIT, None)  # the output's files have names of their own
    where = f"{model}: {prefix[:-1]}" if prefix else str(model)
    return Checkpoint(
        model=model,
        url=url,
        config=config,
        weight_files=tuple(_check_not_empty(storage, url, files[name]) for name in weights.names),
        index=weights.index,
        weight_map=weights.weight_map,
        trusts_headers=trust_headers,
        warnings=tuple(f"{where}: {warning}" for warning in (*credentials, *warnings, *weights.warnings)),
        files=files,
        stem=stem_of(config),
        prefix=prefix,
    )


def _resolve_pipeline(
    stores: Stores, model: ModelRef, url: str, files: Mapping[str, StoredFile], *, trust_headers: bool
) -> Checkpoint:
    """Return a diffusers pipeline, with each component that model_index.json lists."""
    if not is_url(url):
        check_links(Path(url), [PIPELINE, *(name for name in files if name.endswith(f"/{CONFIG}"))])
    stored = read_json(stores.at(url), f"{url}/{PIPELINE}", _MAX_CONFIG_NBYTES)
    content = redact_values(stored)
    directories: dict[str, dict[str, StoredFile]] = {}
    for name, file in files.items():
        directory, _, rest = name.partition("/")
        if rest:
            directories.setdefault(directory, {})[rest] = file
    components = []
    for name in _list_components(content):
        inside = directories.get(name)
        if inside is None:
            raise CheckpointError(
                f"{url}: {PIPELINE} lists {name!r:.100}, and there is no such directory;"
                f" {stores.at(url).advise_download(url)}, or write [null, null] for it there if the pipeline goes"
                " without it"
            )
        check_name(name, f"{url}/{PIPELINE}")
        place, prefix = f"{url}/{name}", f"{name}/"
        if CONFIG in inside:
            part = _read_model(stores, model, place, inside, prefix=prefix, trust_headers=trust_headers)
        else:
            part = Checkpoint(model, place, {}, (), inside, prefix=prefix)
        components.append(part)
    if not any(part.weight_files for part in components):
        raise CheckpointError(f"{url}: no component that {PIPELINE} lists has weights")
    warnings = _warn_of_revision(model, url)
    if content != stored:
        warnings.append(f"{PIPELINE} holds a credential, which no output gets")
    return Checkpoint(
        model=model,
        url=url,
        config=content,
        weight_files=tuple(file for part in components for file in part.weight_files),
        files=files,
        warnings=(*(f"{model}: {line}" for line in warnings), *(line for part in components for line in part.warnings)),
        components=tuple(components),
    )


def _list_components(content: Mapping[str, Any]) -> list[str]:
    """Return the directories that a model_index.json lists.

    >>> _list_components({"_class_name": ["mine", "Pipe"], "vae": ["diffusers", "Vae"], "image_encoder": [None, None]})
    ['vae']
    """
    return [
        name
        for name, value in content.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and None not in value
    ]


def locate_model(stores: Stores, model: ModelRef) -> str:
    """Return the directory of a model: its URL, the path of one that is there, or a repository on the Hub."""
    storage = stores.at(model.path)
    if scheme_of(model.path) != "file":
        return storage.pin(model.path, model.revision)
    path = Path(storage.absolute(model.path))
    if path.is_dir():
        return str(path)
    if path.exists():
        raise CheckpointError(
            f"{model}: a file, not a directory; give the directory that holds {CONFIG} and the weights"
        )
    if HUB_NAME.fullmatch(model.path):
        try:
            return stores.at(f"hf://{model.path}").pin(f"hf://{model.path}", model.revision)
        except FetchError as error:
            if not path.parent.is_dir():
                raise
            raise FetchError(
                f"{model}: no such directory{suggest_directory(path)}; nor from the Hub: {error}"
            ) from error
    is_path = model.path.startswith((".", "/", "~"))
    hint = "" if is_path else "; and no repository of the Hub: those are called owner/name, as Qwen/Qwen2.5-0.5B is"
    where = "" if str(path) == model.path else f" ({path})"
    raise CheckpointError(f"{model}: no such directory{where}{suggest_directory(path) or hint}")


def check_links(directory: Path, names: Iterable[str]) -> None:
    """Refuse links that lead out of a model: whatever they lead to would become part of the output.

    In the Hub's cache, snapshots/REVISION/NAME leads to blobs/HASH. Weights may be links to anywhere: nothing of them
    gets into the output but tensors.
    """
    root = directory.resolve()
    inside = [root, *([root.parents[1] / "blobs"] if root.parent.name == "snapshots" else [])]
    for name in names:
        path = directory / name
        if path.is_symlink() and not any(path.resolve().is_relative_to(parent) for parent in inside):
            raise CheckpointError(
                f"{path}: a link to {path.resolve()}, outside the model's directory, and it would be copied into the"
                " output; if you trust it, replace the link by the file, else delete it"
            )


def _check_not_empty(storage: Storage, url: str, file: StoredFile) -> StoredFile:
    if file.nbytes == 0:
        raise CheckpointError(f"{file.url}: 0 bytes; {storage.advise_download(url)}")
    return file


def nothing_there(storage: Storage, url: str) -> CheckpointError:
    """Say that a directory has no files, or is one itself."""
    with suppress(FileNotFoundError, FetchError):
        storage.stat(url)
        return CheckpointError(
            f"{url}: a file, not a directory; give the directory that holds {CONFIG} and the weights"
        )
    with suppress(FileNotFoundError, FetchError, CheckpointError):
        storage.stat(f"{url}/.raymerge/plan.json")
        return CheckpointError(f"{url}: an unfinished merge; run it again to finish it")
    revision = "" if scheme_of(url) == "hf" else url.rpartition("/")[2].partition("@")[2]
    hint = f", and leave `@{revision}` out: only a Hub repository has revisions" if revision else ""
    return CheckpointError(f"{url}: nothing is there; check the name{hint}, and that you may list it")
