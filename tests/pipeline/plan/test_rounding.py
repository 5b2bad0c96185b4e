"""float32 among shorter tensors: what `dtype` takes of its values is told while planning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import llama_config, llama_tensors, read_tensors, write_checkpoint
from tests.tokenized_models import WIDTH, write_family

DECAYS = [f"model.layers.{layer}.mamba.A_log" for layer in (0, 1)]
NORM = "model.layers.0.mamba.norm.weight"
KEEP = "`keep_float32: true` keeps them as they are"
LIST = "to keep them as they are, list such patterns under `keep_float32`"


@pytest.fixture
def write(tmp_path: Path) -> Any:
    """Return a function that makes a model of bfloat16 with other tensors among them."""

    def write(tensors: dict[str, torch.Tensor], name: str = "a") -> str:
        own = {tensor: values.clone() for tensor, values in tensors.items()}
        return str(
            write_checkpoint(
                tmp_path / name, {**llama_tensors(1, dtype=torch.bfloat16), **own}, llama_config(), num_shards=2
            )
        )

    return write


def warn(*models: str, **more: Any) -> tuple[str, ...]:
    config = {"merge_method": "linear", "models": [{"model": m} for m in models], "parameters": {"weight": 1.0}}
    return plan({**config, "dtype": "bfloat16", **more}).warnings


def test_values_that_change_are_counted_in_all_models(write: Any) -> None:
    exact = torch.tensor([1.0, -2.5, torch.nan, torch.inf, 0.0])
    lossy = torch.tensor([1.0 + 2**-8, -2.5, 3.0, 1.0, 1 + 2**-20])
    models = (
        write({**dict.fromkeys(DECAYS, exact), NORM: exact}),
        write({DECAYS[0]: lossy, DECAYS[1]: exact, NORM: exact}, "b"),
    )
    (warning,) = warn(*models)
    assert warning == (
        f"1 tensor ({DECAYS[0].replace('0', '*')}) stored as float32 among shorter ones, and rounded to bfloat16, which"
        f" changes 2 of 10 values in all models, by up to 0.39%; {KEEP}"
    )
    assert warn(*models, keep_float32=True) == warn(*models, dtype="float32") == ()
    assert "by up to 9.5e-05%" in warn(*models, dtype="float16")[0]


def test_values_that_survive_need_no_word(write: Any, tmp_path: Path) -> None:
    values = torch.randn(64).bfloat16().float()
    model = write(dict.fromkeys((*DECAYS, NORM), values))
    assert warn(model) == ()
    config = {"merge_method": "passthrough", "models": [{"model": model}], "dtype": "bfloat16"}
    merge(config, tmp_path / "out")
    assert torch.equal(read_tensors(tmp_path / "out")[NORM].float(), values)


@pytest.mark.parametrize(
    ("dtype", "values", "says"),
    [
        ("float16", [1e5, 1.0], "changes 1 of 2 values in all models, some to infinity"),
        ("float16", [1e-9, 1.0], "changes 1 of 2 values in all models, by up to 1e+02%"),
        ("bfloat16", [3.4028234e38, 1.0], "changes 1 of 2 values in all models, some to infinity"),
    ],
)
def test_values_beyond_the_dtype(write: Any, dtype: str, values: list[float], says: str) -> None:
    (warning,) = warn(write({NORM: torch.tensor(values)}), dtype=dtype)
    assert says in warning
    assert warning.endswith(LIST)


def test_the_count_is_that_of_torch(write: Any) -> None:
    values = torch.cat([torch.randn(5000), torch.randn(5000) * 1e-39, torch.randn(5000) * 1e38])
    for dtype in (torch.bfloat16, torch.float16):
        rounded = values.to(dtype).float()
        (warning,) = warn(write({NORM: values}), dtype=str(dtype).removeprefix("torch."))
        assert f"changes {int((rounded != values).sum()):,} of 15,000 values" in warning


def test_large_tensors_are_named_without_a_count(write: Any) -> None:
    model = write({"model.wide.weight": torch.zeros(2**18 + 1), NORM: torch.full((4,), 0.1)})
    small, large = warn(model)
    assert small.startswith("1 tensor (model.layers.*.mamba.norm.weight) stored as float32")
    assert "1 tensor (model.wide.weight) stored as float32 among shorter ones" in large
    assert f"too large to tell now what that changes; {LIST}" in large


def test_models_of_float32_are_rounded_as_asked(tmp_path: Path) -> None:
    tensors = {name: tensor.float() for name, tensor in llama_tensors(1).items()}
    assert warn(str(write_checkpoint(tmp_path / "a", tensors, llama_config()))) == ()


def test_models_of_float32_are_rounded_as_asked_whatever_is_made_of_them(tmp_path: Path) -> None:
    first, second, _ = map(str, write_family(tmp_path))
    assert warn(first, second, tokenizer_source="union") == ()
    adapter = write_adapter(tmp_path / "adapter", draw_factors("model.layers.0.self_attn.q_proj", WIDTH, WIDTH))
    assert warn(f"{first}+{adapter}") == ()
    experts = [{"source_model": model, "positive_prompts": [f"fox {k}"]} for k, model in enumerate((first, first))]
    mixture = {"base_model": first, "gate_mode": "cheap_embed", "experts": experts, "dtype": "bfloat16"}
    assert not any("stored as float32" in warning for warning in plan(mixture).warnings)
