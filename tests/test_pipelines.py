"""Pipelines in the layout of diffusers, merged component by component."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from raymerge import inspect, merge, plan, verify
from raymerge.pipeline.errors import CheckpointError, ConfigError, OutputError, TensorMismatchError
from tests.adapters import write_adapter
from tests.checkpoints import Tensors, read_files
from tests.pipelines import STEM, read_pipeline, write_network, write_pipeline
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.stored_models import download, upload, without_own
from tests.watchers import Keep, stop_after

SAFETY = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}


def make_config(*models: Path | str, **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": str(model), "parameters": {"weight": 1 + k}} for k, model in enumerate(models)],
        **more,
    }


def assert_same(found: dict[str, Tensors], expected: dict[str, Tensors]) -> None:
    assert found.keys() == expected.keys()
    for name, tensors in found.items():
        assert tensors.keys() == expected[name].keys()
        assert [key for key, tensor in tensors.items() if not torch.equal(tensor, expected[name][key])] == []


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return write_pipeline(tmp_path / "a", 1), write_pipeline(tmp_path / "b", 2)


def test_components_are_merged_and_the_rest_is_copied(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    out = tmp_path / "out"
    report = merge(make_config(a, b), out)
    assert (report.num_tensors, report.num_shards) == (11, 3)
    found, first, second = map(read_pipeline, (out, a, b))
    assert found.keys() == {"unet", "vae", "text_encoder"}
    for name, tensors in found.items():
        assert tensors.keys() == first[name].keys()
        for key, tensor in tensors.items():
            expected = (first[name][key].double() + 2 * second[name][key].double()) / 3
            torch.testing.assert_close(tensor, expected.float(), rtol=1e-6, atol=1e-7)
    for name in ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json"):
        assert json.loads((out / name).read_text()) == json.loads((a / name).read_text()), name
    assert json.loads((out / "text_encoder/config.json").read_text())["torch_dtype"] == "float32"
    assert verify(out).num_tensors == 11
    assert merge(make_config(a, b), out).was_complete
    assert "library_name: diffusers" in (out / "README.md").read_text()
    assert inspect(out).obstacle == ""
    assert {tensor.name for tensor in inspect(out).tensors} >= {"vae/conv_in.bias", "unet/blocks.2.conv.weight"}


def test_parameters_by_component(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = pair
    t = [{"filter": "unet/", "value": 0.5}, {"filter": "vae/", "value": 1}, {"value": 0}]
    config = {"merge_method": "slerp", "base_model": str(a), "models": [{"model": str(b)}], "parameters": {"t": t}}
    merge(config, tmp_path / "out")
    found, first, second = map(read_pipeline, (tmp_path / "out", a, b))
    for name, tensor in found["vae"].items():
        torch.testing.assert_close(tensor, second["vae"][name])
    for name, tensor in found["text_encoder"].items():
        torch.testing.assert_close(tensor, first["text_encoder"][name])
    assert not torch.equal(found["unet"]["conv_in.bias"], first["unet"]["conv_in.bias"])


def test_shards_of_each_component(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """Inputs and output in several files, an interrupted merge, and the same tensors."""
    config = make_config(*pair)
    merge(config, tmp_path / "whole")
    for directory in pair:
        file = directory / "vae" / f"{STEM}.safetensors"
        tensors = load_file(file)
        file.unlink()
        write_network(file.parent, tensors, json.loads((file.parent / "config.json").read_text()), STEM, num_shards=2)
    out = tmp_path / "out"
    with pytest.raises(RuntimeError, match="the driver broke"):
        merge(config, out, shard_size=400, workers=1, on_event=stop_after(4))
    assert not (out / "model_index.json").exists()
    with pytest.raises(OutputError, match="unfinished"):
        verify(out)
    report = merge(config, out, shard_size=400)
    assert (report.num_shards, report.num_resumed) == (7, 4)
    assert not (out / ".raymerge").exists()
    assert verify(out).num_tensors == 11
    assert_same(read_pipeline(out), read_pipeline(tmp_path / "whole"))
    index = json.loads((out / "vae" / f"{STEM}.safetensors.index.json").read_text())
    assert index["weight_map"]["conv_in.bias"] == f"{STEM}-00003-of-00003.safetensors"
    assert index["metadata"]["total_size"] == 4 * (3 * 4 * 2 * 9 + 4)
    assert (out / "text_encoder" / "model.safetensors").exists()
    (out / "vae" / f"{STEM}-00001-of-00003.safetensors").write_bytes(b"")
    with pytest.raises(OutputError, match="vae/diffusion_pytorch_model-00001"):
        verify(out)


def test_optional_components(tmp_path: Path) -> None:
    """What not all have is the donor's, and what the donor lacks is left out; the plan says so."""
    a = write_pipeline(tmp_path / "a", 1, **SAFETY)
    b = write_pipeline(tmp_path / "b", 2, "text_encoder", image_encoder=["transformers", "CLIPVision"])
    planned = plan(make_config(a, b))
    assert planned.notes[0] == (
        f"components merged: unet, vae; from {a}: text_encoder (not in {b}), safety_checker (not in {b}), scheduler,"
        " tokenizer"
    )
    left_out = f"{b}: image_encoder: no component of {a}, which the output is like"
    assert left_out in planned.dropped
    merge(make_config(a, b), tmp_path / "out")
    found, first = read_pipeline(tmp_path / "out"), read_pipeline(a)
    assert found.keys() == first.keys()
    copied = ("text_encoder", "safety_checker")
    assert_same({name: found[name] for name in copied}, {name: first[name] for name in copied})
    assert "image_encoder" not in (tmp_path / "out" / "model_index.json").read_text()


def _without_denoiser(a: Path, b: Path) -> None:
    write_pipeline(b, 2, "unet", transformer=["diffusers", "SD3Transformer2DModel"])


def _another_class(a: Path, b: Path) -> None:
    write_pipeline(b, 2, unet=["diffusers", "UNet3DConditionModel"])


def _single_model(a: Path, b: Path) -> None:
    shutil.rmtree(b)
    shutil.copytree(a / "unet", b)


def _missing_directory(a: Path, b: Path) -> None:
    shutil.rmtree(b / "vae")


def _pickled(a: Path, b: Path) -> None:
    (b / "vae" / f"{STEM}.safetensors").rename(b / "vae" / f"{STEM}.bin")


def _two_variants(a: Path, b: Path) -> None:
    file = b / "vae" / f"{STEM}.safetensors"
    shutil.copyfile(file, file.with_name(f"{STEM}.ema.safetensors"))
    file.rename(file.with_name(f"{STEM}.fp16.safetensors"))


def _another_shape(a: Path, b: Path) -> None:
    file = b / "vae" / f"{STEM}.safetensors"
    save_file({**load_file(file), "conv_in.bias": torch.ones(5)}, file)


def _link_outside(a: Path, b: Path) -> None:
    (b / "scheduler" / "scheduler_config.json").unlink()
    (b / "scheduler" / "scheduler_config.json").symlink_to("/etc/hostname")
    a.rename(a.with_name("c"))
    b.rename(a)
    a.with_name("c").rename(b)


@pytest.mark.parametrize(
    ("spoil", "error", "said"),
    [
        (_without_denoiser, TensorMismatchError, "unet .UNet2DConditionModel. is in .*, but not in .*, which has"),
        (_another_class, TensorMismatchError, "unet is diffusers.UNet2DConditionModel in .* diffusers.UNet3D"),
        (_single_model, CheckpointError, "/a is a diffusers pipeline and .*/b a single model; .*/a/text_encoder"),
        (_missing_directory, CheckpointError, "model_index.json lists 'vae', and there is no such directory"),
        (_pickled, CheckpointError, "b/vae: only pickled weights .* DiffusionPipeline"),
        (_two_variants, CheckpointError, "several variants of it: diffusion_pytorch_model.ema.safetensors, .*fp16"),
        (_another_shape, TensorMismatchError, "vae/conv_in.bias is .4. in .* and .5. in"),
        (_link_outside, CheckpointError, "scheduler_config.json: a link to /etc/hostname"),
    ],
)
def test_pipelines_that_do_not_fit(
    pair: tuple[Path, Path], spoil: Callable[[Path, Path], None], error: type[Exception], said: str
) -> None:
    spoil(*pair)
    with pytest.raises(error, match=said):
        plan(make_config(*pair))


@pytest.mark.parametrize(
    ("more", "said"),
    [({"tokenizer_source": "union"}, "a tokenizer and diffusers"), ({"chat_template": "auto"}, "a chat template and")],
)
def test_what_is_for_language_models(pair: tuple[Path, Path], more: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(make_config(*pair, **more))


def test_doubts(pair: tuple[Path, Path]) -> None:
    """Schedulers and networks that differ, and a variant that is taken as there is nothing else."""
    a, b = pair
    scheduler = b / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps({"_class_name": "EulerDiscreteScheduler", "prediction_type": "v_prediction"}))
    (b / "vae" / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", "sample_size": 9}))
    (b / "unet" / f"{STEM}.safetensors").rename(b / "unet" / f"{STEM}.fp16.safetensors")
    warnings = "\n".join(plan(make_config(a, b)).warnings)
    assert 'scheduler_config.json: prediction_type is "epsilon" and "v_prediction" in' in warnings
    assert "vae/config.json: sample_size is 8 and 9 in" in warnings
    assert f"{b}: unet: there is only the variant fp16" in warnings


def test_documents(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """A pipeline made of another document's: the bytes of two merges, one after the other."""
    a, b = pair
    c = write_pipeline(tmp_path / "c", 3, **SAFETY)
    merge(make_config(a, b, dtype="float32"), tmp_path / "first")
    merge(make_config(tmp_path / "first", c), tmp_path / "second")
    text = f"""\
name: first
merge_method: linear
models: [{{model: {a}, parameters: {{weight: 1}}}}, {{model: {b}, parameters: {{weight: 2}}}}]
dtype: float32
---
merge_method: linear
models: [{{model: first, parameters: {{weight: 1}}}}, {{model: {c}, parameters: {{weight: 2}}}}]
"""
    merge(text, tmp_path / "out")
    assert_same(read_pipeline(tmp_path / "out"), read_pipeline(tmp_path / "second"))


def test_a_single_component(pair: tuple[Path, Path], tmp_path: Path) -> None:
    a, b = (path / "unet" for path in pair)
    keep = Keep()
    merge(make_config(a, b), tmp_path / "out", shard_size=400, on_event=keep)
    assert (tmp_path / "out" / f"{STEM}-00001-of-00003.safetensors").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads((a / "config.json").read_text())
    assert verify(tmp_path / "out").num_tensors == 4
    again = merge(make_config(tmp_path / "out", b), tmp_path / "again")
    assert again.num_tensors == 4


def write_lora(directory: Path, style: str) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write an adapter for two components as diffusers has done over time; return also what it adds, by tensor."""
    a, b = torch.randn(2, 2, 3, 3), torch.randn(4, 2, 1, 1)
    left, right = torch.randn(4, 2), torch.randn(2, 4)
    names = ("lora_A.weight", "lora_B.weight") if style == "peft" else ("lora.down.weight", "lora.up.weight")
    tensors = {f"unet.blocks.1.conv.{names[0]}": a, f"unet.blocks.1.conv.{names[1]}": b}
    tensors |= {"text_encoder.layers.0.fc.lora_A.weight": right, "text_encoder.layers.0.fc.lora_B.weight": left}
    metadata = {"format": "pt"}
    scale = {"plain": 1.0, "alpha": 1.5, "peft": 4.0}[style]
    if style == "alpha":
        tensors["unet.blocks.1.conv.alpha"] = torch.tensor(3.0)
    elif style == "peft":
        config = {
            "unet.r": 2,
            "unet.lora_alpha": 1,
            "unet.alpha_pattern": {"blocks.1.conv": 8},
            "text_encoder.r": 2,
            "text_encoder.lora_alpha": 2,
        }
        metadata["lora_adapter_metadata"] = json.dumps(config)
    directory.mkdir(parents=True)
    save_file(tensors, directory / "pytorch_lora_weights.safetensors", metadata)
    update = scale * torch.einsum("orij,rcxy->ocxy", b.double(), a.double())
    product = left.double() @ right.double()
    return directory, {"unet/blocks.1.conv.weight": update, "text_encoder/layers.0.fc.weight": product}


@pytest.mark.parametrize("style", ["plain", "alpha", "peft"])
def test_an_adapter_for_a_pipeline(pair: tuple[Path, Path], tmp_path: Path, style: str) -> None:
    lora, updates = write_lora(tmp_path / "lora", style)
    config = make_config(f"{pair[0]}+{lora}", merge_method="passthrough")
    del config["models"][0]["parameters"]
    effects = [effect for adapter in plan(config).adapters for effect in adapter.effects]
    assert effects == [
        f"{pair[0]}/text_encoder: {lora} changes 1 of 3 tensors, rank 2",
        f"{pair[0]}/unet: {lora} changes 1 of 4 tensors, rank 2",
    ]
    merge(config, tmp_path / "out")
    found, first = read_pipeline(tmp_path / "out"), read_pipeline(pair[0])
    for name, tensors in found.items():
        for key, x in tensors.items():
            expected = first[name][key].double() + updates.get(f"{name}/{key}", 0)
            torch.testing.assert_close(x, expected.float(), rtol=1e-5, atol=1e-5)


def test_adapters_that_do_not_fit(pair: tuple[Path, Path], tmp_path: Path) -> None:
    lora, _ = write_lora(tmp_path / "lora", "plain")
    write_adapter(tmp_path / "of_peft", {"x.lora_A.weight": torch.ones(2, 2), "x.lora_B.weight": torch.ones(2, 2)})
    file = tmp_path / "kohya" / "pytorch_lora_weights.safetensors"
    file.parent.mkdir()
    save_file({"lora_unet_blocks_1_conv.lora_down.weight": torch.ones(2, 2)}, file)
    (tmp_path / "alpha").mkdir()
    factors = {"unet.a.lora.down.weight": torch.ones(2, 2), "unet.a.lora.up.weight": torch.ones(2, 2)}
    save_file({**factors, "unet.a.lora.alpha": torch.ones(1)}, tmp_path / "alpha" / file.name)
    (tmp_path / "sd3").mkdir()
    save_file({"transformer.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / "sd3" / file.name)
    for model, adapter, said in (
        (pair[0], tmp_path / "of_peft", "of_peft: an adapter for a single network, and .*/a is a diffusion pipeline"),
        (pair[0] / "unet", lora, "lora: an adapter for a diffusion pipeline, and .*/a/unet is a single network"),
        (pair[0], file.parent, "called as in other programs"),
        (pair[0], tmp_path / "alpha", r"unet/a\.lora\.alpha belongs to no update"),
        (pair[0], tmp_path / "sd3", "the adapter changes transformer, which .*/a does not have, among text_encoder"),
    ):
        with pytest.raises(CheckpointError, match=said):
            plan(make_config(f"{model}+{adapter}"))
    with pytest.raises(CheckpointError, match="lora: a LoRA adapter"):
        plan(make_config(lora, pair[1]))


@pytest.mark.slow
def test_from_store_to_store(
    pair: tuple[Path, Path], bucket: str, s3_server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Local disk, S3 and the Hub give the same bytes."""
    merge(make_config(*pair), tmp_path / "out", shard_size=400)
    expected = without_own(read_files(tmp_path / "out"))
    a, b = (upload(s3_server, bucket, path.name, path) for path in pair)
    merge(make_config(a, b), f"s3://{bucket}/out", shard_size=400)
    assert without_own(download(f"s3://{bucket}/out")) == expected
    assert verify(f"s3://{bucket}/out").num_tensors == 11
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        for name, directory in zip(("org/a", "org/b"), pair, strict=True):
            hub.create_repo(name)
            hub.upload(name, dict(read_files(directory)))
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        merge(make_config("org/a", "org/b"), "hf://me/out", shard_size=400)
        files = hub.read_files("me/out", "main")
        assert without_own({name: files[name] for name in files if name != ".gitattributes"}) == expected
        merge(make_config("hf://org/a/unet", "hf://org/b/unet"), tmp_path / "unet")
    assert (tmp_path / "unet" / f"{STEM}.safetensors").exists()


def test_the_config_that_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the components as pipelines have them, and the VAE stays the base's."""
    monkeypatch.chdir(tmp_path)
    config = Path(__file__).parent.parent / "configs" / "diffusers" / "stable-diffusion-xl.yml"
    base, tuned = "stabilityai/stable-diffusion-xl-base-1.0", "SG161222/RealVisXL_V5.0"
    for seed, name in enumerate((base, tuned)):
        write_pipeline(tmp_path / name, seed, text_encoder_2=["transformers", "CLIPTextModelWithProjection"])
    merge(config, "out")
    found, first = read_pipeline(tmp_path / "out"), read_pipeline(tmp_path / base)
    half = {name: {key: x.half() for key, x in tensors.items()} for name, tensors in first.items()}
    assert_same({"vae": found["vae"]}, {"vae": half["vae"]})
    for name in ("unet", "text_encoder", "text_encoder_2"):
        assert not any(torch.equal(x, half[name][key]) for key, x in found[name].items())
