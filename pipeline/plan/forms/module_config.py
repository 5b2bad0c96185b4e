"""The part of config.json for one module: read as if the module were a model, and written back."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from raymerge.pipeline.checkpoint.model_config import LAYER_COUNTS, Json
from raymerge.pipeline.checkpoint.modules import AUDIO, DECODER, ENCODER, TEXT, VISION

_COUNT = LAYER_COUNTS[0]
"""The field for the number of layers in what is read here, whatever config.json calls it."""
_ENCODER_COUNTS = ("encoder_layers", "num_encoder_layers", *LAYER_COUNTS)
"""Fields for the layers of an encoder; BART and Whisper state them as `num_hidden_layers` besides."""
_DECODER_COUNTS = ("decoder_layers", "num_decoder_layers")
_OF_ENCODER, _OF_DECODER = re.compile(r"^(?:num_)?encoder_"), re.compile(r"^(?:num_)?decoder_")
_SECTIONS = {VISION: re.compile(r"vision|visual|image|vit"), AUDIO: re.compile(r"audio|speech")}
"""Names of sections for modules that are no language model."""


@dataclass(frozen=True, slots=True)
class Section:
    """The place in a config.json that describes a module."""

    path: tuple[str, ...] = ()
    """Keys from the top; none where the module shares the top with others, or is the language model."""
    counts: tuple[str, ...] = ()
    """Fields that count its layers, of which at least one is there; empty where `read` gives all that there is."""
    others: re.Pattern[str] | None = None
    """Fields of the section that describe another module."""

    def read(self, config: Json) -> Json:
        """Return the config.json of the module, as if it were a model."""
        part = self._find(config)
        if not self.counts:
            return part
        depth = next(part[key] for key in self.counts if type(part.get(key)) is int)
        kept = {
            key: value
            for key, value in part.items()
            if key not in (*self.counts, *LAYER_COUNTS) and not (self.others and self.others.match(key))
        }
        return {**kept, _COUNT: depth}

    def write(self, config: Json, module: Json) -> Json:
        """Return a config.json with what it says of the module, as `read` gives it, replaced; both may be changed."""
        if not self.counts:
            return module
        part = self._find(config)
        before = self.read(config)
        part |= {key: value for key, value in module.items() if key != _COUNT}
        if before[_COUNT] != module[_COUNT]:
            if self.others is not None and not any(key in part for key in _DECODER_COUNTS):
                part["num_decoder_layers"] = before[_COUNT]  # T5 leaves it out where both sides are as deep
                counts = _DECODER_COUNTS if self.others is _OF_ENCODER else self.counts
            else:
                counts = self.counts
            for key in counts:
                if part.get(key) == before[_COUNT]:
                    part[key] = module[_COUNT]
        return config

    def _find(self, config: Json) -> Json:
        for key in self.path:
            config = config[key]
        return config


def find_section(config: Json, role: str) -> Section | None:
    """Return where a config.json describes a module, by the module's role; None where it counts no layers of it.

    Args:
        config: of the whole model.
        role: of the module.
    """
    if role == TEXT:
        return Section()
    if role in (ENCODER, DECODER):
        if isinstance(config.get(role), dict):
            return _take(config, (role,), LAYER_COUNTS)
        if role == ENCODER:
            return _take(config, (), _ENCODER_COUNTS, _OF_DECODER)
        return _take(config, (), (*_DECODER_COUNTS, *LAYER_COUNTS), _OF_ENCODER)
    paths = list(_list_paths(config, role)) if role in _SECTIONS else []
    return next((found for path in paths if (found := _take(config, path, (*LAYER_COUNTS, "depth")))), None)


def _take(
    config: Json, path: tuple[str, ...], counts: Sequence[str], others: re.Pattern[str] | None = None
) -> Section | None:
    """Return a section if it counts layers; of a decoder's counts and general ones, the first kind that is there."""
    part = Section(path)._find(config)
    if others is _OF_ENCODER and any(type(part.get(key)) is int for key in _DECODER_COUNTS):
        counts = _DECODER_COUNTS
    elif others is _OF_DECODER and any(type(part.get(key)) is int for key in counts[:2]):
        first = next(part[key] for key in counts[:2] if type(part.get(key)) is int)
        counts = [key for key in counts if part.get(key) == first]
    is_counted = any(type(part.get(key)) is int for key in counts)
    return Section(path, tuple(counts), others) if is_counted else None


def _list_paths(config: Json, role: str, around: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yield the paths of all sections whose names tell that they describe such a module, the outer ones first."""
    part = Section(around)._find(config)
    inner = [(*around, key) for key, value in part.items() if isinstance(value, dict)]
    yield from (path for path in inner if _SECTIONS[role].search(path[-1]))
    for path in inner:
        yield from _list_paths(config, role, path)
