"""A mergekit config, parsed and checked: what to merge, how, and with which parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from raymerge.ops.registry import Base, Op
from raymerge.pipeline.checkpoint.dtypes import OUTPUT_DTYPES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.document import read_document
from raymerge.pipeline.config.methods import check_models, check_sources, parse_method, parse_settings
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import parse_model_ref
from raymerge.pipeline.config.values import Settings
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import shown, suggest

_FORMS = ("models", "slices", "modules")
_NOT_SUPPORTED = {
    "tokenizer": "without it the output gets the tokenizer of base_model, or else of the first model",
    "tokenizer_source": "without it the output gets the tokenizer of base_model, or else of the first model",
    "chat_template": "without it the output gets the chat template of base_model, or else of the first model",
}
_KEYS = (
    "merge_method",
    "models",
    "slices",
    "base_model",
    "dtype",
    "out_dtype",
    "parameters",
    "modules",
    *_NOT_SUPPORTED,
)


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """One entry of `models`: a whole model."""

    model: ModelRef
    parameters: Settings
    """Written under this model: per-model parameters only."""


@dataclass(frozen=True, slots=True)
class SliceSource:
    """One entry of a slice's `sources`: some layers of a model."""

    model: ModelRef
    layer_range: tuple[int, int]
    """Half-open: [start, stop)."""
    parameters: Settings
    """Written under this source: per-model parameters only."""


@dataclass(frozen=True, slots=True)
class OutputSlice:
    """One entry of `slices`: consecutive layers of the output."""

    sources: tuple[SliceSource, ...]
    """At least one; all of the same number of layers."""
    base_model: ModelRef | None
    """Holds for this slice instead of the config's; None where the slice has none of its own."""
    parameters: Settings


@dataclass(frozen=True, slots=True)
class MergeConfig:
    """A merge as the YAML asks for it; exactly one of `models` and `slices` is not empty."""

    method: str
    """Name of a registered op."""
    models: tuple[ModelEntry, ...]
    """As listed; see `entries`."""
    slices: tuple[OutputSlice, ...]
    base_model: ModelRef | None
    dtype: str | None
    """As in a safetensors header; None where the inputs decide."""
    out_dtype: str | None
    """Likewise; goes before `dtype` in the output."""
    parameters: Settings
    """At the top level, for the whole merge."""
    text: str
    """The YAML as given."""
    warnings: tuple[str, ...]
    """What is probably a mistake; each begins with its YAML path."""

    @property
    def entries(self) -> tuple[ModelEntry, ...]:
        """What `models` comes to: the entries as listed, and last a base model that is not among them."""
        listed = any(entry.model == self.base_model for entry in self.models)
        if not self.models or self.base_model is None or listed:
            return self.models
        return (*self.models, ModelEntry(self.base_model, {}))

    @property
    def referenced_models(self) -> tuple[ModelRef, ...]:
        """Every model once: the base first, then in the order of the file."""
        base = (self.base_model,) if self.base_model else ()
        sources = (source.model for part in self.slices for source in part.sources)
        return tuple(dict.fromkeys((*base, *(entry.model for entry in self.models), *sources)))


def load_config(source: Path | str | Mapping[str, object], *, strict: bool = False) -> MergeConfig:
    """Return the merge that a mergekit config describes.

    Args:
        source: a YAML file, YAML text, or an already parsed config.
        strict: refuse what otherwise gives a warning, such as an unknown key.

    Raises:
        ConfigError: the config cannot be read or cannot be meant; the message names the YAML path.
    """
    text, document = read_document(source)
    root = Place(document)
    config = _parse(root, text)
    if strict and root.warnings:
        problems = "\n".join(f"  {warning}" for warning in root.warnings)
        raise ConfigError(f"refused because of strict:\n{problems}")
    return config


def _parse(root: Place, text: str) -> MergeConfig:
    op = parse_method(root.get("merge_method"))
    root.check_keys(_KEYS, _parameter_names(op))
    _check_form(root)
    for key, advice in _NOT_SUPPORTED.items():
        if root.get(key).value is not None:
            raise root.get(key).error(f"not supported yet; {advice}")
    base = _parse_base(root)
    models = _parse_models(root, op, base)
    slices = tuple(_parse_slice(place, root, op, base) for place in _list(root.get("slices")))
    return MergeConfig(
        method=op.name,
        models=models,
        slices=slices,
        base_model=base,
        dtype=_parse_dtype(root.get("dtype")),
        out_dtype=_parse_dtype(root.get("out_dtype")),
        parameters=parse_settings(root.get("parameters"), op, of_model=False),
        text=text,
        warnings=tuple(root.warnings),
    )


def _check_form(root: Place) -> None:
    given = [form for form in _FORMS if root.get(form)]
    if not given:
        written = [form for form in _FORMS if form in root.names()]
        problem = f"{written[0]} is empty" if written else "no models are given"
        raise root.error(f"{problem}; list what to merge under `models`, or layers of it under `slices`")
    if len(given) > 1:
        raise root.error(f"{' and '.join(given)} are given, and only one can be; keep one of them")
    if given == ["modules"]:
        raise root.get("modules").error("not supported yet; write `models` or `slices`")


def _parse_base(place: Place) -> ModelRef | None:
    base = place.get("base_model")
    return None if base.value is None else parse_model_ref(base)


def _parse_models(root: Place, op: Op, base: ModelRef | None) -> tuple[ModelEntry, ...]:
    place = root.get("models")
    places = _list(place)
    entries: list[ModelEntry] = []
    for written in places:
        _check_entry(written, ("model", "parameters"), op)
        entry = ModelEntry(
            parse_model_ref(written.get("model")), parse_settings(written.get("parameters"), op, of_model=True)
        )
        same = next((i for i, other in enumerate(entries) if other.model == entry.model), None)
        if same is not None:
            raise written.get("model").error(
                f"{entry.model} is listed already, as models[{same}]; list each model once, with all of its weight"
            )
        _check_base_parameters(written, op, entry.model, entry.parameters, base)
        entries.append(entry)
    if entries:
        check_models(root.get("base_model"), place, op, [entry.model for entry in entries], base)
    return tuple(entries)


def _parse_slice(place: Place, root: Place, op: Op, base: ModelRef | None) -> OutputSlice:
    _check_entry(place, ("sources", "base_model", "residual_weight", "parameters"), op)
    if place.get("residual_weight").value is not None:
        place.get("residual_weight").warn("has no effect, in mergekit neither; remove it")
    written = place.get("sources")
    if not written:
        raise written.error("no sources are given; list at least one `- model: ...` with its layer_range")
    own_base = _parse_base(place)
    if own_base and op.base is Base.INPUT:
        place.get("base_model").warn(f"has no effect, because {op.name} takes no base; remove it")
    holds = own_base or base
    sources = tuple(_parse_source(source, op, holds) for source in written.elements())
    first = sources[0].layer_range
    for source, where in zip(sources, written.elements(), strict=True):
        start, stop = source.layer_range
        if stop - start != first[1] - first[0]:
            raise where.get("layer_range").error(
                f"[{start}, {stop}] is {stop - start} layers, but the first source of this slice, "
                f"[{first[0]}, {first[1]}], is {first[1] - first[0]}; give all sources of a slice the same length"
            )
    check_sources(root.get("base_model"), written, op, [source.model for source in sources], holds)
    return OutputSlice(sources, own_base, parse_settings(place.get("parameters"), op, of_model=False))


def _parse_source(place: Place, op: Op, base: ModelRef | None) -> SliceSource:
    _check_entry(place, ("model", "layer_range", "parameters"), op)
    model = parse_model_ref(place.get("model"))
    settings = parse_settings(place.get("parameters"), op, of_model=True)
    _check_base_parameters(place, op, model, settings, base)
    return SliceSource(model, _parse_layer_range(place.get("layer_range")), settings)


def _parse_layer_range(place: Place) -> tuple[int, int]:
    advice = "write [start, stop], the first layer and the one after the last, such as [0, 32]"
    match place.value:
        case [int() as start, int() as stop] if not isinstance(start, bool) and not isinstance(stop, bool):
            if 0 <= start < stop:
                return start, stop
            raise place.error(f"[{start}, {stop}] holds no layers; {advice}")
    raise place.error(f"{shown(place.value)} is given; {advice}")


def _parse_dtype(place: Place) -> str | None:
    if place.value is None:
        return None
    name = place.text().removeprefix("torch.")
    if name not in OUTPUT_DTYPES:
        raise place.error(f"{name!r} is no dtype that a merge can be written in; {suggest(name, OUTPUT_DTYPES, 0.5)}")
    return OUTPUT_DTYPES[name]


def _check_entry(place: Place, keys: tuple[str, ...], op: Op) -> None:
    """Check that an entry of a list is a mapping with these keys."""
    if isinstance(place.value, str):
        raise place.error(f"{shown(place.value)} is given, a mapping is needed; write `- {keys[0]}: {place.value}`")
    if place.value is None:
        raise place.error(f"the entry is empty; write `- {keys[0]}: ...`")
    place.check_keys(keys, _parameter_names(op))


def _check_base_parameters(place: Place, op: Op, model: ModelRef, settings: Settings, base: ModelRef | None) -> None:
    if settings and model == base and op.base is Base.REQUIRED:
        place.get("parameters").warn(
            f"ignored ({', '.join(settings)}), because {model} is the base, and {op.name} takes none for the base"
        )


def _list(place: Place) -> list[Place]:
    return list(place.elements()) if place else []


def _parameter_names(op: Op) -> list[str]:
    return [parameter.name for parameter in op.parameters]
