"""Files that planning has worked out: weights that go where the plan goes, and small files of documents' outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from hashlib import sha256
from typing import NoReturn

from raymerge.pipeline.errors import OutputError
from raymerge.pipeline.stores.files import Buffer, ByteRange, StoredFile
from raymerge.pipeline.stores.seam import Lock, Storage, Writer

INLINE_URL = "inline://plan"
"""The URL of all of them: they lie nowhere, and are told apart by their etags."""


_SHOWN = 12
"""Digits of a hash that tell contents apart."""


@dataclass(frozen=True, slots=True)
class InlineFile(StoredFile):
    """A file whose content goes where its plan goes."""

    content: bytes = field(default=b"", repr=False)


def make_file(content: bytes, etag: str = "") -> InlineFile:
    """Return a file of a plan.

    Args:
        content: all of it.
        etag: what decides the content; a hash of it by default.
    """
    return InlineFile(INLINE_URL, len(content), etag or sha256(content).hexdigest(), content)


class InlineStorage(Storage):
    """Reads `InlineFile`s, and nothing else."""

    def __init__(self) -> None:
        self._files: dict[str, InlineFile] = {}

    def add(self, directory: str, name: str, content: bytes) -> InlineFile:
        """Return a file that is found by its URL from now on; one of other content has another URL."""
        digest = sha256(content).hexdigest()
        url = f"{directory}/{digest[:_SHOWN]}/{name}"
        return self._files.setdefault(url, InlineFile(url, len(content), digest, content))

    def absolute(self, url: str) -> str:  # noqa: D102
        return url

    def stat(self, url: str) -> StoredFile:  # noqa: D102
        if url not in self._files:
            raise FileNotFoundError(f"{url}: no file; its content is in the plan alone")
        return self._files[url]

    def list(self, url: str) -> Mapping[str, StoredFile]:  # noqa: D102
        return {}

    def read_into(self, ranges: Sequence[ByteRange], buffers: Sequence[Buffer], *, max_gap: int = 0) -> None:
        """Copy out of the files."""
        for piece, buffer in zip(ranges, buffers, strict=True):
            assert isinstance(piece.file, InlineFile)
            buffer[:] = piece.file.content[piece.start : piece.stop]

    def check_unchanged(self, file: StoredFile) -> None:
        """Nothing changes a plan."""

    def open_writer(  # noqa: D102
        self, url: str, nbytes: int, partial_url: str | None = None, *, exclusive: bool = False
    ) -> Writer:
        _refuse(url)

    def delete(self, url: str) -> None:  # noqa: D102
        _refuse(url)

    def lock(self, url: str, *, restart: bool = False) -> AbstractContextManager[Lock]:  # noqa: D102
        _refuse(url)


def _refuse(url: str) -> NoReturn:
    raise OutputError(f"{url}: a plan cannot be written to")
