"""Names of models as mergekit writes them: `path[@revision][+lora]`, or a mapping; and URLs."""

from __future__ import annotations

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

NO_MODEL = "no model is named; give a directory or a Hub repository, such as `org/name`"


def parse_model_ref(place: Place) -> ModelRef:
    """Return the model that is named at a place of the config.

    Raises:
        ConfigError: it is no model reference, or one with a LoRA.
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
    if place.get("lora").value is not None:
        raise place.get("lora").error("LoRA adapters are not supported yet; merge the adapter into its model first")
    if place.get("override_architecture").value is not None:
        place.get("override_architecture").warn(
            "has no effect: the merge follows the checkpoint's own tensor names; remove it"
        )
    model = place.get("model")
    if isinstance(model.value, str):
        return _parse_string(model, model.text())
    if not model:
        raise place.error(f"`model` is missing; write a name, or {MAPPING_FORM}")
    return _parse_mapping(model)


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


def spelling_key(model: ModelRef) -> tuple[str, str | None]:
    """Return what two names of one model have in common: `./a/` and `a`, or `org/a` and `hf://org/a@main`."""
    path = model.path.rstrip("/") or model.path
    if scheme_of(path) == "hf" or is_repository(path):
        name, _, revision = path.removeprefix("hf://").partition("@")
        return f"hf://{name}", model.revision or revision or _DEFAULT_REVISION
    if not is_url(path):
        return str(Path(path).absolute()), None
    return path, model.revision


def _parse_mapping(place: Place) -> ModelRef:
    place.check_keys(("path", "revision"))
    revision = place.get("revision")
    return ModelRef(place.get("path").text(), revision.text() if revision.value is not None else None)


def _parse_string(place: Place, name: str) -> ModelRef:
    if is_url(name) and scheme_of(name) != "hf":
        return ModelRef(name)  # no revisions there, and both signs may be part of it
    hint = f"; if the sign is part of the path, write {MAPPING_FORM}"
    model, plus, _ = name.partition("+")
    if plus:
        raise place.error(f"{name!r} names a LoRA adapter (`model+lora`), which is not supported yet{hint}")
    path, at, revision = model.partition("@")
    if "@" in revision:
        raise place.error(f"{name!r} has more than one `@` (`path@revision`){hint}")
    if not path.strip() or (at and not revision.strip()):
        raise place.error(f"{name!r} lacks a {'revision' if path.strip() else 'path'} (`path@revision`){hint}")
    return ModelRef(path, revision if at else None)
