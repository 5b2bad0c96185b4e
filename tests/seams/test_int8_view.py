"""A view of matrices that are stored as int8 with a scale for each row."""

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
class Int8Rows(Decoder):
    columns: int

    def temporary_nbytes(self, num_elements: int) -> int:
        return 32 * num_elements

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        values, scales = raw.pieces[0].view(torch.int8), raw.pieces[1].view(torch.float32)
        rows = torch.arange(start, stop, device=out.device) // self.columns - raw.start // self.columns
        return torch.mul(values[start - raw.start : stop - raw.start], scales[rows], out=out)


@dataclass(frozen=True, slots=True)
class ScaledTensor(Source):
    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    origins: tuple[StoredTensor, StoredTensor]

    @property
    def decoder(self) -> Decoder:
        return Int8Rows(self.shape[1])

    @property
    def identity(self) -> Identity:
        return ["int8 rows", *(tensor.identity for tensor in self.origins)]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        values, scales = self.origins
        columns = self.shape[1]
        return (*values.ranges(start, stop), *scales.ranges(start // columns, -(-stop // columns)))

    def max_nbytes(self, num_elements: int) -> int:
        values, scales = self.origins
        return values.max_nbytes(num_elements) + scales.max_nbytes(num_elements // self.shape[1] + 2)


class Int8View(View):
    def __init__(self, below: View) -> None:
        self.ref = below.ref
        self._below = below

    def names(self) -> Collection[str]:
        return [name for name in self._below.names() if not name.endswith("_scale")]

    def find(self, name: str) -> Source | None:
        values, scales = self._below.find(name), self._below.find(f"{name}_scale")
        if not (isinstance(values, StoredTensor) and isinstance(scales, StoredTensor)):
            return values
        return ScaledTensor(values.model, name, "BF16", values.shape, (values, scales))


def test_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values, scales = draw(901, 333).mul(40).clamp(-127, 127).to(torch.int8), draw(901, seed=1).abs()
    model = write_model(tmp_path / "m", {"a": values, "a_scale": scales, "b": draw(5)})
    look_through(monkeypatch, Int8View)
    merged = merge_in_every_way(passthrough(model), tmp_path / "out")
    assert merged.keys() == {"a", "b"}
    assert torch.equal(merged["a"], values * scales[:, None])
