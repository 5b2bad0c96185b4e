"""Names of models as mergekit writes them: `path[@revision][+adapter[@revision]]`, or a mapping; and URLs."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from raymerge.pipeline.checkpoint.checkpoint import is_repository
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.messages import shown
from raymerge.pipeline.urls import is_url, scheme_of

MAPPING_FORM = "{model: {path: ..., revision: ...}}"
"""Says what the string form cannot: a path with `@` or `+` in it."""

_DEFAULT_REVISION = "main"
_ONE_AFTER_THE_OTHER = "apply the first to its model by `merge_method: passthrough`, and the second to the output"

_URL = re.compile(r"[A-Za-z][A-Za-z0-9.-]*://")

NO_MODEL = "no model is named; give a directory or a Hub repository, such as `org/name`"

ParseModel = Callable[[Place], ModelRef]
"""Returns the model that is named at a place of the config."""


def parse_model_ref(place: Place) -> ModelRef:
    """Return the model that is named at a place of the config.

    Raises:
        ConfigError: it is no model reference.
    """
    if isinstance(place.value, str):
        return _parse_string(place, place.text())
    if not place:
        raise place.error(NO_MODEL)
    if not isinstance(place.value, dict):
        raise place.error(f"{shown(place.value)} is given, a model's name is needed; put it in quotes if it is one")
    if "path" in place.value and place.get("model").value is None:
        return _parse_mapping(place)
    place.check_keys(("model", "lora", "override_architecture"))
    if place.get("override_architecture").value is not None:
        place.get("override_architecture").warn(
            "has no effect: the merge follows the checkpoint's own tensor names; remove it"
        )
    model = place.get("model")
    if not model:
        raise place.error(f"`model` is missing; write a name, or {MAPPING_FORM}")
    found, lora = _parse_part(model), place.get("lora")
    if lora.value is None:
        return found
    if found.adapter is not None:
        raise lora.error(f"an adapter is given twice: {found.adapter} is in {shown(model.value)}; keep one of them")
    adapter = _parse_part(lora)
    if adapter.adapter is not None:
        raise lora.error(f"{shown(lora.value)} names two adapters, and one is expected; {_ONE_AFTER_THE_OTHER}")
    return replace(found, adapter=adapter)


def parse_revision(place: Place, model: ModelRef) -> ModelRef:
    """Return a model at the revision that is written beside it, if any.

    Raises:
        ConfigError: the model's name has another revision, or this is none.
    """
    if place.value is None:
        return model
    revision = place.text()
    if model.revision not in (None, revision):
        raise place.error(f"{revision!r} is given, and {model.revision!r} with the model's name; keep one of them")
    return replace(model, revision=revision)


def spelling_key(model: ModelRef) -> tuple[object, ...]:
    """Return what two names of one model have in common: `./a/` and `a`, or `org/a` and `hf://org/a@main`."""
    adapter = spelling_key(model.adapter) if model.adapter else ()
    path = model.path.rstrip("/") or model.path
    if scheme_of(path) == "hf" or is_repository(path):
        name, _, revision = path.removeprefix("hf://").partition("@")
        return f"hf://{name}", model.revision or revision or _DEFAULT_REVISION, *adapter
    if not is_url(path):
        return str(Path(path).absolute()), None, *adapter
    return path, model.revision, *adapter


def _parse_part(place: Place) -> ModelRef:
    """Return a model or an adapter: its name, or a mapping of path and revision."""
    if isinstance(place.value, str):
        return _parse_string(place, place.text())
    return _parse_mapping(place)


def _parse_mapping(place: Place) -> ModelRef:
    place.check_keys(("path", "revision"))
    revision = place.get("revision")
    return ModelRef(place.get("path").text(), revision.text() if revision.value is not None else None)


def _parse_string(place: Place, name: str) -> ModelRef:
    model, *adapters = _split(name)
    if len(adapters) > 1:
        raise place.error(f"{name!r} names {len(adapters)} adapters, and one is expected; {_ONE_AFTER_THE_OTHER}")
    found = _parse_name(place, name, model)
    return replace(found, adapter=_parse_name(place, name, adapters[0])) if adapters else found


def _split(name: str) -> list[str]:
    """Return the model and its adapters; the sign may be part of a URL where no other one follows.

    >>> _split("org/a+org/b@v1"), _split("s3://bucket/a+b"), _split("s3://bucket/a+s3://bucket/b")
    (['org/a', 'org/b@v1'], ['s3://bucket/a+b'], ['s3://bucket/a', 's3://bucket/b'])
    """
    parts = [""]
    for part in name.split("+"):
        if parts[-1] and is_url(parts[-1]) and scheme_of(parts[-1]) != "hf" and not _URL.match(part):
            parts[-1] += f"+{part}"
        else:
            parts.append(part)
    return parts[1:]


def _parse_name(place: Place, name: str, part: str) -> ModelRef:
    """Return a model or an adapter by its name, which is part of what is written."""
    if is_url(part) and scheme_of(part) != "hf":
        return ModelRef(part)  # no revisions there, and both signs may be part of it
    hint = f"; if the sign is part of the path, write {MAPPING_FORM}"
    path, at, revision = part.partition("@")
    if "@" in revision:
        raise place.error(f"{name!r} has more than one `@` (`path@revision`){hint}")
    if not path.strip() or (at and not revision.strip()):
        form = "path@revision" if "+" not in name else "model@revision+adapter@revision"
        raise place.error(f"{name!r} lacks a {'revision' if path.strip() else 'path'} (`{form}`){hint}")
    return ModelRef(path, revision if at else None)
