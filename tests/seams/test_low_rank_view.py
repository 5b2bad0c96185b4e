"""A view that adds a low-rank update, B @ A, to the tensors that have one; and two of them, one on the other."""

from __future__ import annotations

from collections.abc import Collection
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


@dataclass(frozen=True, slots=True)
class AddLowRank(Decoder):
    below: Decoder
    columns: int
    rank: int

    def temporary_nbytes(self, num_elements: int) -> int:
        return self.below.temporary_nbytes(num_elements) + 32 * num_elements

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        *below, b, a = raw.pieces
        self.below.decode(Raw(below, raw.start, raw.stop), start, stop, out)
        b, a = b.view(torch.float32).view(-1, self.rank), a.view(torch.float32).view(self.rank, -1)
        elements = torch.arange(start, stop, device=out.device)
        rows, columns = elements // self.columns - raw.start // self.columns, elements % self.columns
        for k in range(self.rank):  # in one order, however it is cut
            out.add_(b[rows, k].mul_(a[k, columns]))
        return out


@dataclass(frozen=True, slots=True)
class UpdatedTensor(Source):
    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    below: Source
    b: StoredTensor
    a: StoredTensor

    @property
    def decoder(self) -> Decoder:
        return AddLowRank(self.below.decoder, self.shape[1], self.b.shape[1])

    @property
    def origins(self) -> tuple[StoredTensor, ...]:
        return (*self.below.origins, self.b, self.a)

    @property
    def identity(self) -> Identity:
        return ["low rank", self.below.identity, self.b.identity, self.a.identity]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        columns, rank = self.shape[1], self.b.shape[1]
        rows = self.b.ranges(start // columns * rank, -(-stop // columns) * rank)
        return (*self.below.ranges(start, stop), *rows, *self.a.ranges(0, self.a.num_elements))

    def max_nbytes(self, num_elements: int) -> int:
        rows = num_elements // self.shape[1] + 2
        update = self.b.max_nbytes(rows * self.b.shape[1]) + self.a.max_nbytes(self.a.num_elements)
        return self.below.max_nbytes(num_elements) + update


class LowRankView(View):
    def __init__(self, below: View, adapter: str) -> None:
        self.ref = below.ref
        self._below = below
        self._adapter = adapter

    def names(self) -> Collection[str]:
        return [name for name in self._below.names() if f".{self._adapter}." not in name]

    def find(self, name: str) -> Source | None:
        below, b, a = (self._below.find(name + end) for end in ("", f".{self._adapter}.B", f".{self._adapter}.A"))
        if below is None or not (isinstance(b, StoredTensor) and isinstance(a, StoredTensor)):
            return below
        return UpdatedTensor(below.model, name, below.dtype, below.shape, below, b, a)


def test_low_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, b, a = draw(901, 333).bfloat16(), draw(901, 4, seed=1), draw(4, 333, seed=2)
    other_b, other_a = draw(901, 2, seed=3), draw(2, 333, seed=4)
    adapters = {"w.one.B": b, "w.one.A": a, "w.two.B": other_b, "w.two.A": other_a}
    model = write_model(tmp_path / "m", {"w": base, "norm": draw(5), **adapters})
    look_through(monkeypatch, lambda below: LowRankView(LowRankView(below, "one"), "two"))
    merged = merge_in_every_way(passthrough(model), tmp_path / "out")
    assert merged.keys() == {"w", "norm"}
    expected = base.double() + b.double() @ a.double() + other_b.double() @ other_a.double()
    torch.testing.assert_close(merged["w"].double(), expected, rtol=0, atol=1e-5)
