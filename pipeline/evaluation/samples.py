"""Samples of an evaluation as JSON lines, appended one by one, so that a killed run keeps what was finished."""

from __future__ import annotations

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from raymerge.pipeline.decoding import decode, parse_json
from raymerge.pipeline.stores.local.path import local_path
from raymerge.pipeline.stores.open import Stores
from raymerge.pipeline.urls import scheme_of

_MAX_NBYTES = 16 * 2**30
_UPLOAD_SECONDS = 30.0
"""Between uploads of the lines so far, to stores that cannot append."""


@dataclass(frozen=True, slots=True)
class Sample:
    """The result of one item of a task, done once; the fields are the keys of a line."""

    item: str
    """Id of the item, unique in its task."""
    number: int
    """Number of the sample among those of the item, from 0."""
    score: float | None
    """1 for a right answer, 0 for a wrong one; None where there is no answer to check."""
    tokens: int | None = None
    """Generated, thinking included, without the token that ends the text."""
    thinking: bool | None = None
    """Whether it contains a closed thinking part."""
    cut_off: bool | None = None
    """Whether it reached the largest number of tokens."""
    measures: Mapping[str, float] = field(default_factory=dict)
    """Further figures."""
    detail: Mapping[str, object] = field(default_factory=dict)
    """Question and answer; written, and not kept in memory."""

    @property
    def key(self) -> tuple[str, int]:
        """Key of the sample within the task."""
        return self.item, self.number

    def dump(self) -> bytes:
        """Return its line."""
        content = {name: getattr(self, name) for name in self.__slots__ if name != "detail"}
        # a terminal may show half of a surrogate pair; UTF-8 cannot
        return (json.dumps({**content, "detail": self.detail}, ensure_ascii=True) + "\n").encode()


def parse_samples(content: bytes) -> Iterator[Sample]:
    """Yield the samples in a file of JSON lines, without their details; damaged and torn lines are left out."""
    for line in content.splitlines(keepends=True):
        if not line.endswith(b"\n"):
            continue
        try:
            sample: Sample = decode(parse_json(line), Sample)
        except (ValueError, TypeError, KeyError):
            continue
        yield replace(sample, detail={})


class SampleLog(ABC):
    """The samples of one model and task, each written as soon as it is there."""

    def __init__(self, content: bytes) -> None:
        self.samples = {sample.key: sample for sample in parse_samples(content)}
        """By item and number; without details."""

    def add(self, sample: Sample) -> None:
        """Write a sample, unless it is there."""
        if sample.key not in self.samples:
            self._write(sample.dump())
            self.samples[sample.key] = replace(sample, detail={})

    def clear(self) -> None:
        """Drop all samples."""
        self._clear()
        self.samples = {}

    @abstractmethod
    def _clear(self) -> None: ...

    @abstractmethod
    def _write(self, line: bytes) -> None: ...

    @abstractmethod
    def close(self) -> None:
        """Have all samples in the store."""


class _LocalLog(SampleLog):
    """A file that is appended to."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        os.ftruncate(self._file, whole)  # the rest of the last line was never written
        super().__init__(content[:whole])

    def _clear(self) -> None:
        os.ftruncate(self._file, 0)

    def _write(self, line: bytes) -> None:
        try:
            while line:
                line = line[os.write(self._file, line) :]
        except OSError as error:
            error.filename = str(self._path)  # such as of a full disk, which is no fault of the model
            raise

    def close(self) -> None:
        os.fsync(self._file)
        os.close(self._file)


class _UploadedLog(SampleLog):
    """A file of a store that cannot append: replaced now and then by one with more lines."""

    def __init__(self, stores: Stores, url: str) -> None:
        self._storage, self._url = stores.at(url), url
        try:
            content = self._storage.read(url, _MAX_NBYTES)
        except FileNotFoundError:
            content = b""
        super().__init__(content)
        self._lines = [content[: content.rfind(b"\n") + 1]]
        self._uploaded_at = time.monotonic()

    def _clear(self) -> None:
        self._lines = []

    def _write(self, line: bytes) -> None:
        self._lines.append(line)
        if time.monotonic() - self._uploaded_at > _UPLOAD_SECONDS:
            self.close()

    def close(self) -> None:
        self._lines = [b"".join(self._lines)]
        self._storage.write(self._url, self._lines[0])
        self._uploaded_at = time.monotonic()


@contextmanager
def open_log(stores: Stores, url: str) -> Iterator[SampleLog]:
    """Have the samples of a file, and add to them."""
    log: SampleLog = _LocalLog(local_path(url)) if scheme_of(url) == "file" else _UploadedLog(stores, url)
    try:
        yield log
    finally:
        log.close()
