"""A file system of the plain kind, writes in parts, and cases that are slow."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.local import LocalFileSystem

from raymerge.pipeline.stores.fsspec.files import FsspecFiles
from tests.pipeline.stores.storage_contract import MIB

NUMBERS = itertools.count()
"""For names in memory, which all tests share."""


class PlainFileSystem(LocalFileSystem):  # type: ignore[misc]
    """A file system of the plain kind: it writes in place, and does not rename over a file."""

    protocol = "plain"

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return path.removeprefix("plain://").rstrip("/")

    def _open(self, path: str, mode: str = "rb", *, autocommit: bool = True, **kwargs: Any) -> Any:
        if not autocommit:
            raise NotImplementedError("autocommit=False")
        return super()._open(path, mode, **kwargs)

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        if Path(path2).exists():
            raise FileExistsError(path2)
        Path(path1).rename(path2)


def write_parts(storage: FsspecFiles, url: str, data: bytes, *, exclusive: bool = False) -> None:
    writer = storage.open_writer(url, len(data), exclusive=exclusive)
    for start in range(0, len(data), 3 * MIB):
        writer.write(data[start : start + 3 * MIB])
    writer.commit()


def slow(*values: object) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)
