"""The places of models that a record names: found from any directory, and after the spectrum has moved."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from raymerge.cluster.home import expand_home
from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Op
from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.checkpoint.find import FoundModel, find_models
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.document import read_documents
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.reference import parse_model_ref
from raymerge.pipeline.config.sections.chat_template import names_template_file
from raymerge.pipeline.spectrum.record import Spectrum
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of


def note_places(spectrum: Spectrum, directory: str, models: Sequence[ModelRef]) -> Spectrum:
    """Return a record that says where it was made, unless no path depends on that.

    A record on the Hub does not say it, which is no place for the paths of a machine.

    Args:
        spectrum: the record.
        directory: in which it is.
        models: all that it names.
    """
    parts = dict.fromkeys(part.path for model in models for part in (model, model.adapter) if part is not None)
    local = tuple(path for path in parts if scheme_of(path) == "file" and not is_repository(path))
    if not local or scheme_of(directory) == "hf":
        return spectrum
    return replace(spectrum, started_in=str(Path.cwd()), place=directory, local=local)


def locate_path(spectrum: Spectrum, directory: str, path: str) -> str:
    """Return a path or URL of a record such that it means the same in every directory.

    A path is looked for where it was when the sweep ran, and else where it is if it has moved together with the
    spectrum. Where neither is there, it is where it was, unless it may be something else than a path.

    Args:
        spectrum: the record.
        directory: in which it is.
        path: as its recipe or YAML has it.
    """
    if not spectrum.started_in or scheme_of(path) != "file":
        return path
    was, *others = list_places(spectrum, directory, path)
    for place in (was, *others):
        if Path(place).exists():
            return place
    return was if path in spectrum.local else path


def list_places(spectrum: Spectrum, directory: str, path: str) -> list[str]:
    """Return where a local path of a record may be: where it was, and beside the spectrum where that has moved."""
    was = Path(spectrum.started_in, expand_home(local_path(path)))
    places = [str(was)]
    if scheme_of(directory) == scheme_of(spectrum.place) == "file":
        places.append(os.path.normpath(Path(directory, os.path.relpath(was, spectrum.place))))
    return list(dict.fromkeys(places))


def parse_ref(name: str) -> ModelRef:
    """Return the model that a record, or a user, names.

    Raises:
        ConfigError: it is no name of a model.
    """
    return parse_model_ref(Place(name, "MODEL"))


def locate_ref(spectrum: Spectrum, directory: str, ref: ModelRef) -> ModelRef:
    """Return a model of a record, with its adapter, such that it means the same in every directory."""
    adapter = ref.adapter and locate_ref(spectrum, directory, ref.adapter)
    return ModelRef(locate_path(spectrum, directory, ref.path), ref.revision, adapter)


def load_point(stores: Stores, spectrum: Spectrum, directory: str, text: str, own: OwnOps | None = None) -> MergeConfig:
    """Return the config of a point, with its models located.

    Raises:
        ConfigError: it cannot be read.
    """
    start = locate_path(spectrum, directory, ".") if spectrum.started_in else ""
    if start in ("", str(Path.cwd())):
        return load_config(text, own=own, find=partial(find_models, stores))  # as it is written, so that its card is
    config = load_config(_locate_templates(spectrum, directory, text), own=own, find=partial(_find, stores, start))
    outputs = {step.name for step in config.steps}

    def locate(value: Any) -> Any:
        if isinstance(value, ModelRef):
            return value if value.path in outputs else locate_ref(spectrum, directory, value)
        if is_dataclass(value) and not isinstance(value, type | Op | OwnOps):
            own_values = {each.name: getattr(value, each.name) for each in fields(value) if each.init}
            return replace(value, **{name: locate(each) for name, each in own_values.items()})
        if isinstance(value, tuple):
            return tuple(locate(each) for each in value)
        if isinstance(value, Mapping):
            return {locate(key): locate(each) for key, each in value.items()}
        return value

    located: MergeConfig = locate(config)
    return located


def _find(stores: Stores, start: str, pattern: str) -> Sequence[FoundModel]:
    """Return the models that a pattern matches, relative to where the sweep ran."""
    return find_models(stores, str(Path(start, pattern)) if scheme_of(pattern) == "file" else pattern)


def _locate_templates(spectrum: Spectrum, directory: str, text: str) -> str:
    """Return a config's text with its files of chat templates located."""
    contents = [document.content for document in read_documents(text)]
    has_files = False
    for content in contents:
        name = content.get("chat_template")
        if isinstance(name, str) and names_template_file(name.strip()):
            content["chat_template"] = locate_path(spectrum, directory, name.strip())
            has_files = True
    return str(yaml.safe_dump_all(contents, sort_keys=False)) if has_files else text
