"""Models brought to this machine's disk for an evaluation, and deleted after it."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from raymerge.pipeline.checkpoint.files import is_hidden, is_rewritten, is_side_file, is_weights
from raymerge.pipeline.evaluation.subjects import Subject
from raymerge.pipeline.spectrum.materialise import materialised
from raymerge.pipeline.stores.local.storage import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of


@contextmanager
def bring_here(stores: Stores, subject: Subject) -> Iterator[str]:
    """Have a model in a directory of this machine: where it is, or copied or merged for as long as the context lasts.

    Raises:
        RaymergeError: it cannot be read or merged.
    """
    if subject.url and scheme_of(subject.url) == "file":
        yield str(local_path(subject.url))
        return
    if subject.point is not None:
        with materialised(subject.directory, subject.point) as directory:
            yield directory
        return
    with tempfile.TemporaryDirectory(prefix="raymerge-") as scratch:
        directory = f"{scratch}/{subject.name}"
        _fetch(stores, subject.url, directory)
        yield directory


def _fetch(stores: Stores, url: str, directory: str) -> None:
    files = stores.at(url).list(url)
    has_safetensors = any(name.endswith(".safetensors") and "/" not in name for name in files)
    wanted = {
        name: file
        for name, file in files.items()
        if not is_hidden(name)
        and (is_side_file(name) or is_rewritten(name) or (is_weights(name) and "/" not in name))
        and not (has_safetensors and is_weights(name) and not name.endswith(".safetensors"))
    }
    stores.at(directory).check_space(directory, sum(file.nbytes for file in wanted.values()))
    for name, file in wanted.items():
        path = Path(directory, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as copy:
            for piece in stores.read_pieces(file):
                copy.write(piece)
