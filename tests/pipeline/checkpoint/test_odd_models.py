"""Whole merges of checkpoints that no one trains, but that nothing forbids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.ops.registry import Base, load_ops
from tests.checkpoints import read_tensors, write_checkpoint, write_llama
from tests.statistics import write_statistics

VALUES = {"weight": 1.0, "density": 0.5, "t": 0.5, "alpha": 0.5}


def odd_tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "scalar": torch.tensor(value),
        "one": torch.full((1, 1), value),
        "empty": torch.zeros(0),
        "empty.rows": torch.zeros(3, 0, 2),
        "ключ.0.вес": torch.full((2,), value),
        'quote " and \\ and\nline': torch.full((2,), value, dtype=torch.bfloat16),
        "layers.01.w": torch.full((2,), value),
        "layers.1.w": torch.full((3,), value),
        "1²": torch.full((2,), value),
        "double": torch.full((2,), value, dtype=torch.float64),
        "half": torch.full((5,), value, dtype=torch.float16),
        "thin": torch.full((3, 2), value),
        "ids": torch.arange(5),
        "mask": torch.tensor([True, False]),
        "no.ids": torch.arange(0),
    }


@pytest.mark.parametrize("name", load_ops())
@pytest.mark.parametrize("config", [{}, {"num_hidden_layers": 0}, {"architectures": None, "text_config": {"a": 1}}])
def test_odd_tensors_and_configs(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    op = load_ops()[name]
    base, *others = (
        str(write_checkpoint(tmp_path / m, odd_tensors(v), config)) for m, v in zip("abc", (1.0, 3.0, 3.0), strict=True)
    )
    models = others if op.base is Base.REQUIRED else [base, *others]
    merge(
        {
            "merge_method": name,
            "models": [{"model": model, **write_statistics(op, model)} for model in models[: op.max_models]],
            "parameters": {p.name: VALUES[p.name] for p in op.parameters if p.name in VALUES},
            **({"base_model": base} if op.base is Base.REQUIRED else {}),
        },
        tmp_path / "out",
    )
    found = read_tensors(tmp_path / "out")
    expected = odd_tensors(1.0)
    assert {n: (x.shape, x.dtype) for n, x in found.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}
    assert torch.equal(found["ids"], torch.arange(5))
    assert all(bool(x.isfinite().all()) for x in found.values())
    if name == "slerp":
        assert found["scalar"] == 2
        assert torch.equal(found["double"], torch.full((2,), 2.0, dtype=torch.float64))


def test_a_buffer_that_holds_one_block_of_each_of_many_models(tmp_path: Path) -> None:
    num_models, num_elements = 70, 2**17 + 3
    models = []
    for k in range(num_models):
        tensors = {"w": torch.full((num_elements,), float(k), dtype=torch.bfloat16)}
        models.append({"model": str(write_checkpoint(tmp_path / f"m{k}", tensors, {}))})
    config = {"merge_method": "linear", "models": models, "parameters": {"weight": 1.0}, "dtype": "float32"}
    merge(config, tmp_path / "out", memory="32MiB")
    (found,) = read_tensors(tmp_path / "out").values()
    assert torch.equal(found, torch.full((num_elements,), sum(range(num_models)) / num_models))


def test_the_fingerprint_stays_when_the_models_move(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fingerprint(directory: Path, **limits: Any) -> str:
        monkeypatch.chdir(directory)
        config = {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 1.0}}
        return plan(config, **limits).fingerprint

    for name, seed in (("a", 1), ("b", 2)):
        write_llama(tmp_path / "here" / name, seed)
    before = fingerprint(tmp_path / "here")
    assert fingerprint(tmp_path / "here", memory="1GiB", workers=1) == before
    assert fingerprint(tmp_path / "here", seed=1) != before
    assert fingerprint(tmp_path / "here", shard_size="10kB") != before
    (tmp_path / "here").rename(tmp_path / "there")
    assert fingerprint(tmp_path / "there") == before
    write_llama(tmp_path / "there" / "b", seed=2)
    assert fingerprint(tmp_path / "there") != before, "the same bytes, but who can know that"


def test_a_frankenmerge_on_disk(tmp_path: Path) -> None:
    a, b = (write_llama(tmp_path / name, seed, num_layers=6) for name, seed in (("a", 1), ("b", 2)))
    slices = [{"sources": [{"model": str(m), "layer_range": r}]} for m, r in ((a, [0, 4]), (b, [2, 6]))]
    merge({"merge_method": "passthrough", "slices": slices}, tmp_path / "out")
    found, first, second = (read_tensors(path) for path in (tmp_path / "out", a, b))
    assert len(found) == 3 + 8 * 9
    for name, tensor in found.items():
        layer = int(name.split(".")[2]) if "layers" in name else None
        if layer is None:
            expected = (first if "embed" in name else second)[name]
        else:
            source = name.replace(f"layers.{layer}.", f"layers.{layer - 2}.") if layer >= 4 else name
            expected = (second if layer >= 4 else first)[source]
        assert torch.equal(tensor, expected)
