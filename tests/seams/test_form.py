"""A form that makes one output tensor of tensors of other names in two models, and one of nothing at all."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from raymerge.ops.decoders.decoder import Decoder, Raw
from raymerge.ops.kernels.sparsifiers.random import RandomBits
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import Identity, Source, StoredTensor
from raymerge.pipeline.checkpoint.views.view import View
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.plan import forms
from raymerge.pipeline.plan.forms.form import Form, Input, Model, OutputTensor
from raymerge.pipeline.stores.files import ByteRange
from raymerge.testing import merge_in_every_way, write_model
from tests.seams.merging import draw


@dataclass(frozen=True, slots=True)
class Noise(Decoder):
    seed: int
    name: str

    def temporary_nbytes(self, num_elements: int) -> int:
        return 8 * num_elements

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        RandomBits(self.seed, self.name, 0).write(start, (out, torch.empty_like(out)))
        return out.copy_(out.view(torch.int32).clone()).mul_(2.0**-31)


@dataclass(frozen=True, slots=True)
class RandomTensor(Source):
    model: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    decoder: Noise
    origins: tuple[StoredTensor, ...] = ()

    @property
    def identity(self) -> Identity:
        return ["noise", self.decoder.seed, self.decoder.name]

    def ranges(self, start: int, stop: int) -> tuple[ByteRange, ...]:
        return ()

    def max_nbytes(self, num_elements: int) -> int:
        return 0


class NoiseView(View):
    ref = ModelRef("seeded noise")

    def names(self) -> Collection[str]:
        return ["noise"]

    def find(self, name: str) -> Source | None:
        return RandomTensor(str(self.ref), name, "F32", (700, 300), Noise(5, name))


class PairsAndNoise(Form):
    @staticmethod
    def is_used(config: MergeConfig) -> bool:
        return True

    def list_tensors(self) -> Iterator[OutputTensor]:
        views = [model.view for model in self.models.values()]
        scope = self.make_scope(None, ())
        yield OutputTensor("both", 0.0, (Input(views[0], "left"), Input(views[1], "right")), scope)
        yield OutputTensor("new", 0.0, (Input(NoiseView(), "noise"),), scope)

    def explain_unused(self, model: Model, name: str) -> str:
        return "not one of the pair"


def test_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = [{"left": draw(901, 333), "a": draw(3)}, {"right": draw(901, 333, seed=1), "b": draw(4)}]
    models = [write_model(tmp_path / f"m{k}", x) for k, x in enumerate(tensors)]
    monkeypatch.setattr(forms, "_FORMS", (PairsAndNoise,))
    config = {"merge_method": "linear", "models": [{"model": model} for model in models], "parameters": {"weight": 1}}
    merged = merge_in_every_way(config, tmp_path / "out")
    assert torch.equal(merged["both"], (tensors[0]["left"] + tensors[1]["right"]) / 2)
    noise = merged["new"].double()
    assert merged.keys() == {"both", "new"}
    assert abs(noise.mean()) < 0.01
    assert abs(noise.var() - 1 / 3) < 0.01
    assert len(set(noise.flatten().tolist())) > 200_000
