"""raymerge_manifest.json: what a merged model was made of, and the checksum of every file."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.redact import redact, redact_texts

MANIFEST = "raymerge_manifest.json"
FIGURES = "raymerge_figures.parquet"
"""Beside the manifest: a row for each tensor, with its norm and what the merge has measured."""

MAX_MANIFEST_NBYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class OutputFile:
    """One finished file."""

    nbytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """The manifest of a finished output; the fields are the keys of the JSON."""

    raymerge: str
    """Version that made it."""
    torch: str
    python: str
    fingerprint: str
    """Hash of everything that decides the output's bytes."""
    seed: int
    method: str
    config: str
    """The YAML as given."""
    models: Sequence[Mapping[str, str | None]]
    """For each model the name that the config has for it, and the revision that was read."""
    inputs: Sequence[Mapping[str, str | int]]
    """The files that tensors were read from."""
    warnings: Sequence[str]
    dropped: Sequence[str]
    """Input tensors that are not in the output."""
    nonfinite: Sequence[str]
    """Tensors with NaN or infinity."""
    figures: Mapping[str, Mapping[str, float]]
    """For each column of the figures its smallest, mean and largest value."""
    files: Mapping[str, OutputFile]
    """Every file but the manifest itself."""

    def dump(self) -> str:
        """Return the text of the file, without credentials."""
        return json.dumps(redact_texts(asdict(self)), indent=1, ensure_ascii=False) + "\n"


@dataclass(frozen=True, slots=True)
class Contents:
    """The part of a manifest that a later run goes by."""

    fingerprint: str
    nonfinite: tuple[str, ...]
    files: Mapping[str, OutputFile]


def parse_manifest(content: bytes) -> Contents:
    """Return the contents that a manifest lists.

    Raises:
        ValueError: it is damaged.
    """
    try:
        contents: Contents = decode(parse_json(content), Contents)
    except (TypeError, KeyError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error
    return contents


@dataclass(frozen=True, slots=True)
class Origin:
    """The origin of a model that raymerge made, as far as its manifest says so."""

    version: str
    method: str
    models: tuple[str, ...]
    """As the config calls them, without credentials."""


def parse_origin(manifest: Mapping[str, object]) -> Origin:
    """Return how a model was made, by the parsed JSON of a manifest that may be damaged."""
    listed = manifest.get("models")
    models = [item.get("model") for item in listed if isinstance(item, dict)] if isinstance(listed, list) else []
    return Origin(
        str(manifest.get("raymerge", "of unknown version")),
        str(manifest.get("method", "unknown method")),
        tuple(redact(str(model)) for model in models),
    )
