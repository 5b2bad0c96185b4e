"""Digests of models: equal ones are the same model, wherever they lie."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping

from raymerge.pipeline.checkpoint.files import (
    ADAPTER_CONFIG,
    CONFIG,
    PIPELINE,
    is_hidden,
    is_of_component,
    is_rewritten,
    is_side_file,
    is_weights,
)
from raymerge.pipeline.checkpoint.manifest import FIGURES, MANIFEST, MAX_MANIFEST_NBYTES, OutputFile, parse_manifest
from raymerge.pipeline.decoding import parse_json
from raymerge.pipeline.stores.files import StoredFile
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_DIRECTORY = ".digests"
"""In the directory of the results: what was hashed once."""
_MAX_NBYTES = 2**20
_SMALL_NBYTES = 32 * 2**20
"""Files of a store up to this size are read; of larger ones its etag counts."""


class Digests:
    """The digests of models, kept below a directory so that contents are hashed once."""

    def __init__(self, stores: Stores, directory: str) -> None:
        self._stores = stores
        self._directory = f"{directory}/{_DIRECTORY}"

    def measure(self, url: str) -> str:
        """Return the digest of a model: of its weights, config, tokenizer and chat template.

        A merged model's weights are taken from its manifest, unless they were changed after it was written; other
        local weights are hashed once, and those of stores are told by their checksums.

        Raises:
            FetchError: a file cannot be read.
        """
        there = self._stores.at(url).list(url)
        files = {
            name: file
            for name, file in there.items()
            if not is_hidden(name)
            and name != FIGURES
            and (_counts(name) or (PIPELINE in there and (name == PIPELINE or is_of_component(name))))
        }
        listed = self._read_manifest(url)
        parts = {name: self._digest_file(url, name, file, listed.get(name)) for name, file in files.items()}
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    def find(self, key: str) -> str | None:
        """Return what is kept for a key, such as the fingerprint of a plan."""
        url = self._url(key)
        try:
            found = parse_json(self._stores.at(url).read(url, _MAX_NBYTES))
        except (FileNotFoundError, ValueError):
            return None
        return str(found["value"]) if isinstance(found, dict) and found.get("key") == key else None

    def keep(self, key: str, value: str) -> None:
        """Keep a value for a key."""
        url = self._url(key)
        self._stores.at(url).write(url, json.dumps({"key": key, "value": value}).encode())

    def _url(self, key: str) -> str:
        return f"{self._directory}/{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"

    def _read_manifest(self, url: str) -> Mapping[str, OutputFile]:
        try:
            return parse_manifest(self._stores.at(url).read(f"{url}/{MANIFEST}", MAX_MANIFEST_NBYTES)).files
        except (FileNotFoundError, ValueError):
            return {}

    def _digest_file(self, url: str, name: str, file: StoredFile, listed: OutputFile | None) -> str:
        is_local = scheme_of(url) == "file"
        if (
            listed is not None
            and is_weights(name)
            and listed.nbytes == file.nbytes
            and not (is_local and _is_newer(file.url, f"{url}/{MANIFEST}"))
        ):
            return listed.sha256
        if file.nbytes <= _SMALL_NBYTES:
            return _hash(self._stores.read_pieces(file))
        if not is_local:
            return f"{file.nbytes} {file.content_id}"
        key = f"{file.url} {file.nbytes} {file.etag}"
        found = self.find(key)
        if found is None:
            found = _hash(self._stores.read_pieces(file))
            self.keep(key, found)
        return found


def _counts(name: str) -> bool:
    """Tell whether a file decides what a model does: not its card, and not what says how it was made."""
    return (
        name in (CONFIG, ADAPTER_CONFIG)
        or is_weights(name)
        or is_side_file(name)
        or (is_rewritten(name) and ".index." in name)
    )


def _is_newer(url: str, than: str) -> bool:
    """Tell whether a file was written, or put in its place, later than another: what is moved keeps its age."""
    own, other = (local_path(each).stat() for each in (url, than))
    return max(own.st_mtime_ns, own.st_ctime_ns) > max(other.st_mtime_ns, other.st_ctime_ns)


def _hash(pieces: Iterator[memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
