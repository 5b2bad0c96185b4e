"""A view of an embedding in another vocabulary: rows in another order, and zeros for rows that are missing."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from raymerge.ops.decoders.decoder import Decoder, Raw
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.stores.files import ByteRange
from raymerge.testing import merge_in_every_way, write_model
from tests.seams.merging import draw, look_through, passthrough

Rows = tuple[int | None, ...]


def cut(rows: Rows, columns: int, start: int, stop: int) -> Iterator[tuple[int, int, int | None]]:
    """Yield the elements [first, last) of each row between two elements, and where the first one is stored."""
    for row in range(start // columns, -(-stop // columns)):
        first, last = max(start, row * columns), min(stop, (row + 1) * columns)
        stored = rows[row]
        yield first, last, None if stored is None else stored * columns + first - row * columns


@dataclass(frozen=True, slots=True)
class GatherRows(Decoder):
    below: Decoder
    rows: Rows
    columns: int

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        pieces = iter(raw.pieces)
        for first, last, stored in cut(self.rows, self.columns, raw.start, raw.stop):
            piece = None if stored is None else next(pieces)
            begin, end = max(first, start), min(last, stop)
            if begin >= end:
                continue
            values = out[begin - start : end - start]
            if piece is None:
                values.zero_()
            else:
                self.below.decode(Raw([piece], first, last), begin, end, values)
        return out


@dataclass(frozen=True, slots=True)
class GatheredTensor(Source):
    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: StoredTensor
    rows: Rows

    @property
    def decoder(self) -> Decoder:
        return GatherRows(self.below.decoder, self.rows, self.shape[1])

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        return (self.below,)

    @property
    def identity(self) -> Identity:
        return ["rows", self.below.identity, list(map(str, self.rows))]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        found = cut(self.rows, self.shape[1], start, stop)
        return tuple(
            piece
            for first, last, stored in found
            if stored is not None
            for piece in self.below.ranges(stored, stored + last - first)
        )

    def max_nbytes(self, num_elements: int) -> int:
        return (num_elements // self.shape[1] + 2) * self.below.max_nbytes(self.shape[1])


class VocabularyView(View):
    def __init__(self, below: View) -> None:
        self.ref = below.ref
        self._below = below

    def names(self) -> Collection[str]:
        return self._below.names()

    def find(self, name: str) -> Source | None:
        below = self._below.find(name)
        if not isinstance(below, StoredTensor) or name != "embed":
            return below
        return GatheredTensor(below.model, name, below.dtype, (len(ROWS), below.shape[1]), below, ROWS)


ROWS: Rows = (*range(800, 400, -1), None, 7, 7, *range(300), None)


def test_gathered_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    embed = draw(901, 333).bfloat16()
    model = write_model(tmp_path / "m", {"embed": embed, "norm": draw(5)})
    look_through(monkeypatch, VocabularyView)
    merged = merge_in_every_way(passthrough(model), tmp_path / "out")
    expected = [torch.zeros(333) if row is None else embed[row].float() for row in ROWS]
    assert torch.equal(merged["embed"], torch.stack(expected))
