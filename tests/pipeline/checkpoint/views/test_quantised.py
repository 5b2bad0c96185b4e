from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import inspect, merge, plan
from raymerge.pipeline.errors import CheckpointError
from tests.checkpoints import Tensors, llama_config, llama_tensors, read_files, write_checkpoint, write_llama

BNB = {"quant_method": "bitsandbytes", "load_in_4bit": True}


def bitsandbytes(name: str, x: torch.Tensor) -> Tensors:
    return {
        name: torch.zeros(x.numel() // 2, 1, dtype=torch.uint8),
        f"{name}.absmax": torch.ones(2),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(64, dtype=torch.uint8),
    }


def llm_int8(name: str, x: torch.Tensor) -> Tensors:
    return {name: x.to(torch.int8), f"{name.removesuffix('weight')}SCB": torch.ones(len(x))}


def gptq(name: str, x: torch.Tensor) -> Tensors:
    module = name.removesuffix("weight")
    return {
        f"{module}qweight": torch.zeros(x.shape[1] // 8, len(x), dtype=torch.int32),
        f"{module}qzeros": torch.zeros(1, 4, dtype=torch.int32),
        f"{module}scales": torch.ones(1, len(x), dtype=torch.float16),
    }


def mxfp4(name: str, x: torch.Tensor) -> Tensors:
    name = name.removesuffix(".weight")
    packed = torch.zeros(len(x), 2, 16, dtype=torch.uint8)
    return {f"{name}_blocks": packed, f"{name}_scales": packed[..., 0].clone()}


def fp8(name: str, x: torch.Tensor) -> Tensors:
    return {name: x.to(torch.float8_e4m3fn), f"{name}_scale_inv": torch.ones(1, 1)}


def compressed(name: str, x: torch.Tensor) -> Tensors:
    packed = torch.zeros(len(x), x.shape[1] // 8, dtype=torch.int32)
    return {f"{name}_packed": packed, f"{name}_scale": torch.ones(len(x), 1), f"{name}_shape": torch.tensor(x.shape)}


def mlx(name: str, x: torch.Tensor) -> Tensors:
    module = name.removesuffix("weight")
    packed = torch.zeros(len(x), x.shape[1] // 8).to(torch.uint32)
    return {name: packed, f"{module}scales": torch.ones(len(x), 1), f"{module}biases": torch.ones(len(x), 1)}


FORMATS: list[Callable[[str, torch.Tensor], Tensors]] = [bitsandbytes, llm_int8, gptq, mxfp4, fp8, compressed, mlx]


def passthrough(model: Path, **more: Any) -> dict[str, Any]:
    return {"merge_method": "passthrough", "models": [{"model": str(model)}], **more}


@pytest.mark.parametrize("pack", FORMATS)
@pytest.mark.parametrize("is_stated", [False, True])
def test_packed_tensors_are_known_by_what_stands_beside_them(
    pack: Callable[[str, torch.Tensor], Tensors], is_stated: bool, tmp_path: Path
) -> None:
    tensors: Tensors = {}
    for name, x in llama_tensors(dtype=torch.bfloat16).items():
        tensors.update(pack(name, x) if "proj" in name else {name: x})
    stated: dict[str, Any] = {"quantization_config": {"quant_method": "q"}} if is_stated else {}
    model = write_checkpoint(tmp_path / "m", tensors, llama_config(**stated))
    said = r"quantised \(config.json: quantization_config \(q\)\)" if is_stated else "config.json does not say so"
    with pytest.raises(
        CheckpointError,
        match=f"{model}: .*{said}.*not supported yet; take the model that it was made from, or dequantise first",
    ):
        plan(passthrough(model, dtype="bfloat16"))
    assert "of packed numbers" in inspect(model).obstacle


def test_integers_that_are_no_weights_are_copied(tmp_path: Path) -> None:
    others = {
        "model.mask": torch.ones(4, 4, dtype=torch.uint8),
        "attn.mask": torch.ones(4, 4, dtype=torch.uint8),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.uint8),
        "h.0.attn.scale": torch.ones(1),
        "attn.logit_scale": torch.ones(1),
        "attn.relative_position_index": torch.zeros(4, 4, dtype=torch.int64),
        "norm.scale": torch.ones(4),
        "norm.steps": torch.tensor(3, dtype=torch.int32),
    }
    merge(passthrough(write_checkpoint(tmp_path / "m", llama_tensors() | others, llama_config())), tmp_path / "out")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"quantization_config": {"quant_method": ["fp8"]}}, r"\(\['fp8'\]\)\)"),
        ({"quantization_config": {"quant_method": "fp8"}}, r"\(config.json: quantization_config \(fp8\)\)"),
        ({"text_config": {"quantization_config": {"bits": 4}}}, r"\(config.json: text_config.quantization_config\)"),
        ({"a": {"b": {"compression_config": {"x": 1}}}}, r"\(config.json: a.b.compression_config\)"),
    ],
)
def test_whole_weights_under_a_config_that_says_quantised(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", **config)
    with pytest.raises(CheckpointError, match=f"{message}, and yet none of its tensors.*take that out of its files"):
        plan(passthrough(model))
    content = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({key: content[key] for key in content.keys() - config.keys()}))
    plan(passthrough(model))


def test_another_file_says_quantised(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m")
    (model / "hf_quant_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"quantised \(hf_quant_config.json\), and yet none"):
        plan(passthrough(model))


def test_a_fine_tune_that_was_merged_back_to_16_bits_is_merged(tmp_path: Path) -> None:
    plain = write_llama(tmp_path / "plain", dtype=torch.bfloat16)
    twice: dict[str, Any] = {"text_config": {"quantization_config": BNB}}
    kept = write_llama(tmp_path / "kept", dtype=torch.bfloat16, quantization_config=BNB, **twice)
    the_plan = plan(passthrough(kept))
    assert (
        "config.json: text_config.quantization_config (bitsandbytes), but the weights are whole" in the_plan.warnings[0]
    )
    merge(passthrough(kept), tmp_path / "out")
    merge(passthrough(plain), tmp_path / "expected")
    found, expected = (read_files(tmp_path / name) for name in ("out", "expected"))
    assert found["model.safetensors"] == expected["model.safetensors"]
    assert json.loads(found["config.json"]) == {**json.loads(expected["config.json"]), "text_config": {}}


def test_a_config_may_say_that_nothing_is_quantised(tmp_path: Path) -> None:
    model = write_llama(tmp_path / "m", quantization_config=None, text_config={"quantization_config": {}})
    assert plan(passthrough(model)).warnings == ()
