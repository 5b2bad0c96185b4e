"""Methods that take statistics of each model's tensors, from files beside the models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from raymerge import merge, plan
from raymerge.ops.errors import OpParameterError
from raymerge.ops.registry import find_op
from raymerge.pipeline.errors import CheckpointError, ConfigError, TensorMismatchError
from raymerge.pipeline.plan.report import format_plan
from raymerge.testing import draw_models, merge_in_every_way, read_model
from tests.checkpoints import llama_config, read_tensors, write_checkpoint, write_family
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server
from tests.statistics import write_statistics
from tests.tokenized_models import read_vocab
from tests.tokenized_models import write_family as write_tokenized_family

Tensors = dict[str, torch.Tensor]
SHAPES = {"wide": (40, 90), "square": (60, 60), "tall": (700, 30), "norm": (5,), "scalar": (), "empty": (0, 4)}
NAMES = ("wide", "square", "tall")
"""Of the tensors that have Gram matrices."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Three models, with files of both kinds of statistics beside them."""
    models = draw_models(tmp_path_factory.mktemp("models"), 3, SHAPES)
    for model in models:
        write_statistics(find_op("fisher"), model, torch.bfloat16)
        random = torch.Generator().manual_seed(int(model[-1]))
        inputs = {name: torch.randn(200, SHAPES[name][1], generator=random) for name in NAMES}
        inputs = {name: x * torch.rand(x.shape[1], generator=random) + 0.5 for name, x in inputs.items()}
        save_file({name: x.T @ x for name, x in inputs.items()}, f"{model}-gram.safetensors")
    return models


def make_config(models: list[str], key: str = "fisher", **changes: Any) -> dict[str, Any]:
    method = {"fisher": "fisher", "gram": "regmean"}[key]
    listed = [{"model": model, key: f"{model}-{key}.safetensors"} for model in models]
    return {"merge_method": method, "models": listed, **changes}


def read_both(models: list[str], key: str) -> tuple[list[Tensors], list[Tensors]]:
    files = (models, [f"{model}-{key}.safetensors" for model in models])
    tensors, statistics = ([read_model(path) for path in paths] for paths in files)
    return tensors, statistics


def test_fisher_is_its_formula_in_every_way(models: list[str], tmp_path: Path) -> None:
    tensors, information = read_both(models, "fisher")
    for name, merged in merge_in_every_way(make_config(models), tmp_path).items():
        factors = [found[name].double() for found in information]
        expected = sum(f * x[name].double() for f, x in zip(factors, tensors, strict=True)) / sum(factors)
        torch.testing.assert_close(merged.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("alpha", [0.9, 1.0, 0.0])
def test_regmean_is_its_formula_in_every_way(alpha: float, models: list[str], tmp_path: Path) -> None:
    tensors, grams = read_both(models, "gram")
    config = make_config(models, "gram", parameters={"alpha": alpha})
    merged = merge_in_every_way(config, tmp_path) if alpha == 0.9 else read_out(config, tmp_path / "out")
    for name, found in merged.items():
        inputs = [x[name].double() for x in tensors]
        expected = torch.stack(inputs).mean(0)
        if name in NAMES:
            shrunk = [alpha * g[name].double() + (1 - alpha) * g[name].diagonal().double().diag() for g in grams]
            expected = (
                torch.stack(shrunk).sum(0).inverse() @ sum(g @ x.T for g, x in zip(shrunk, inputs, strict=True))
            ).T
        assert (found - expected).norm() <= 1e-4 * (expected - inputs[0]).norm()


def read_out(config: dict[str, Any], out: Path) -> Tensors:
    merge(config, out, workers=1)
    return read_model(out)


def test_inputs_that_no_layer_has_seen_are_averaged(tmp_path: Path) -> None:
    models = draw_models(tmp_path, 2, {"w": (7, 6)})
    for model in models:
        gram = torch.eye(6)
        gram[4:] = 0
        save_file({"w": gram}, f"{model}-gram.safetensors")
    first, second = (read_model(model)["w"] for model in models)
    merged = read_out(make_config(models, "gram"), tmp_path / "out")["w"]
    torch.testing.assert_close(merged, (first + second) / 2)


def test_what_no_model_has_information_on_is_averaged_by_weight(tmp_path: Path) -> None:
    models = draw_models(tmp_path, 2, {"w": (3,)})
    save_file({"w": torch.tensor([0.0, 1e-40, 3e-30])}, f"{models[0]}-fisher.safetensors")
    save_file({"w": torch.tensor([0.0, 0.0, 1e-30])}, f"{models[1]}-fisher.safetensors")
    config = make_config(models)
    config["models"][1]["parameters"] = {"weight": 3.0}
    first, second = (read_model(model)["w"] for model in models)
    expected = torch.stack([first[0] / 4 + second[0] * 3 / 4, first[1], (first[2] + second[2]) / 2])
    torch.testing.assert_close(read_out(config, tmp_path / "out")["w"], expected)


def test_fisher_information_follows_the_rows_of_tokens(tmp_path: Path) -> None:
    models = list(map(str, write_tokenized_family(tmp_path)))
    tensors = [read_model(model) for model in models]
    for model in models:
        write_statistics(find_op("fisher"), model)
    config = make_config(models, base_model=models[0], tokenizer_source="union")
    merged = read_out(config, tmp_path / "out")
    information = [read_model(f"{model}-fisher.safetensors") for model in models]
    own, out = [read_vocab(Path(model)) for model in models], read_vocab(tmp_path / "out")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        for token, number in out.items():
            has = [k for k, vocab in enumerate(own) if token in vocab]
            rows = [(information[k][name][own[k][token]], tensors[k][name][own[k][token]]) for k in has]
            expected = sum(f * x for f, x in rows) / sum(f for f, _ in rows)
            torch.testing.assert_close(merged[name][number], expected)


def test_the_plan_says_what_is_merged_without_and_what_is_not_used(models: list[str], tmp_path: Path) -> None:
    grams = {**read_model(f"{models[0]}-gram.safetensors"), "other": torch.eye(3)}
    save_file(grams, tmp_path / "more.safetensors")
    config = make_config(models, "gram")
    config["models"][0]["gram"] = str(tmp_path)
    text = format_plan(plan(config))
    assert "note: 3 tensors (empty, ...) merged without Gram matrices" in text
    assert f"not in the output: {tmp_path}: 1 tensor (other): Gram matrices of no tensor that is merged" in text


def test_statistics_decide_the_fingerprint_and_are_in_the_manifest(models: list[str], tmp_path: Path) -> None:
    config = make_config(models)
    before = plan(config).fingerprint
    merge(config, tmp_path / "out", workers=1)
    manifest = json.loads((tmp_path / "out" / "raymerge_manifest.json").read_text())
    files = {(entry["model"], entry["file"]) for entry in manifest["inputs"]}
    place = f"{models[0]}-fisher.safetensors"
    assert (place, Path(place).name) in files
    config["models"][0]["fisher"] = f"{models[1]}-fisher.safetensors"
    assert plan(config).fingerprint != before


def test_slices_and_a_tied_head_take_what_belongs_to_the_stored_tensors(tmp_path: Path) -> None:
    untied, other = write_family(tmp_path, 1, num_layers=3)
    tensors = read_tensors(other)
    del tensors["lm_head.weight"]
    tied = write_checkpoint(tmp_path / "tied", tensors, llama_config(3, tie_word_embeddings=True))
    places = [str(untied), str(tied)]
    keys = [write_statistics(find_op("fisher"), place) for place in places]
    sources = [{"model": place, "layer_range": [1, 3], **key} for place, key in zip(places, keys, strict=True)]
    merged = read_out({"merge_method": "fisher", "slices": [{"sources": sources}]}, tmp_path / "out")
    models, information = read_both(places, "fisher")
    up_proj = "model.layers.{}.mlp.up_proj.weight".format
    for name, stored in (
        (up_proj(1), [up_proj(2)] * 2),
        ("lm_head.weight", ["lm_head.weight", "model.embed_tokens.weight"]),
    ):
        factors = [found[name] for found, name in zip(information, stored, strict=True)]
        products = [f * x[name] for f, x, name in zip(factors, models, stored, strict=True)]
        torch.testing.assert_close(merged[name], sum(products) / sum(factors))


def test_they_come_from_s3_and_the_hub(
    models: list[str], s3_server: S3Server, bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(models)
    merge(config, tmp_path / "local", workers=1)
    contents = [Path(f"{model}-fisher.safetensors").read_bytes() for model in models]
    s3_server.client().put_object(Bucket=bucket, Key="fisher/one.safetensors", Body=contents[0])
    with HubServer(tmp_path / "hub") as hub:
        hub.add_token("hf_writer", user="me", can_write=["me"])
        hub.create_repo("org/statistics")
        hub.upload("org/statistics", {"a/b.safetensors": contents[1], "c.safetensors": contents[2]})
        for name, value in hub.environment(tmp_path).items():
            monkeypatch.setenv(name, value)
        places = [f"s3://{bucket}/fisher", "hf://org/statistics/a/b.safetensors", "org/statistics"]
        for entry, place in zip(config["models"], places, strict=True):
            entry["fisher"] = place
        merge(config, tmp_path / "remote", workers=1)
    file = "model.safetensors"
    assert (tmp_path / "local" / file).read_bytes() == (tmp_path / "remote" / file).read_bytes()


def lack_one(entry: dict[str, Any], directory: Path) -> None:
    tensors = read_model(entry["fisher"])
    del tensors["norm"]
    entry["fisher"] = write(directory, tensors)


def cut_one(entry: dict[str, Any], directory: Path) -> None:
    tensors = read_model(entry["fisher"])
    entry["fisher"] = write(directory, {**tensors, "wide": tensors["wide"][1:].clone()})


def rename_all(entry: dict[str, Any], directory: Path) -> None:
    entry["gram"] = write(directory, {f"x.{name}": x for name, x in read_model(entry["gram"]).items()})


def transpose_one(entry: dict[str, Any], directory: Path) -> None:
    entry["gram"] = write(directory, {**read_model(entry["gram"]), "wide": torch.eye(40)})


def write(directory: Path, tensors: Tensors) -> str:
    save_file(tensors, directory / "changed.safetensors")
    return str(directory / "changed.safetensors")


def forget(entry: dict[str, Any], directory: Path) -> None:
    del entry["fisher"]


def misspell(entry: dict[str, Any], directory: Path) -> None:
    entry["fischer"] = entry.pop("fisher")


def write_a_number(entry: dict[str, Any], directory: Path) -> None:
    entry["fisher"] = 3


def name_nothing(entry: dict[str, Any], directory: Path) -> None:
    entry["fisher"] = str(directory / "no.safetensors")


def name_a_directory(entry: dict[str, Any], directory: Path) -> None:
    entry["fisher"] = str(directory)


def name_the_model(entry: dict[str, Any], directory: Path) -> None:
    entry["fisher"] = entry["model"]


@pytest.mark.parametrize(
    ("key", "change", "error", "message"),
    [
        ("fisher", forget, ConfigError, r"models\[1\].fisher: is missing: fisher needs the diagonal .* give its file"),
        ("fisher", misspell, ConfigError, r"models\[1\].fischer: unknown key; did you mean 'fisher'"),
        ("fisher", write_a_number, ConfigError, r"^models\[1\].fisher: 3 is given, a model's name is needed[^\n]*$"),
        ("fisher", name_nothing, CheckpointError, r"models\[[01]\]\.fisher: .*no such file or directory"),
        ("fisher", name_a_directory, CheckpointError, "there is no .safetensors file in"),
        ("fisher", name_the_model, CheckpointError, "the model .* itself, whose weights are no statistics"),
        ("fisher", lack_one, TensorMismatchError, "norm of .*model1 has no diagonal elements .* in .*changed"),
        ("fisher", cut_one, TensorMismatchError, r"wide is \[40, 90\] in .*must be \[40, 90\].*they are \[39, 90\]"),
        ("gram", rename_all, TensorMismatchError, "has no Gram matrices in .*changed"),
        ("gram", transpose_one, TensorMismatchError, r"Gram matrices must be \[90, 90\].*they are \[40, 40\]"),
    ],
)
def test_what_does_not_fit_is_found_while_planning(
    key: str,
    change: Callable[[dict[str, Any], Path], None],
    error: type[Exception],
    message: str,
    models: list[str],
    tmp_path: Path,
) -> None:
    config = make_config(models, key)
    change(config["models"][1], tmp_path)
    with pytest.raises(error, match=message):
        plan(config)


def test_names_that_fit_nothing_are_told(models: list[str], tmp_path: Path) -> None:
    config = make_config(models, "gram")
    for entry in config["models"]:
        rename_all(entry, tmp_path)
    with pytest.raises(TensorMismatchError, match=r"none of the Gram matrices there .*x\.square.*need the names"):
        plan(config)


def test_a_base_and_a_pattern_name_none(models: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"base_model: fisher needs .* and this one is merged, too"):
        plan(make_config(models, base_model="org/other"))
    with pytest.raises(ConfigError, match=r"models: fisher needs .* and a pattern names none; list the models"):
        plan({"merge_method": "fisher", "models": {"glob": f"{models[0][:-1]}?"}})


def test_values_that_are_none_are_told_with_the_tensor(models: list[str], tmp_path: Path) -> None:
    information = read_model(f"{models[0]}-fisher.safetensors")
    information["norm"][2] = -1e-5
    save_file(information, tmp_path / "negative.safetensors")
    config = make_config(models)
    config["models"][0]["fisher"] = str(tmp_path / "negative.safetensors")
    with pytest.raises(OpParameterError, match=r"fisher, tensor norm: Fisher information of -1.\d+e-05 is given"):
        merge(config, tmp_path / "out", workers=1)
    wrong = {"negative": -torch.eye(90), "not symmetric": torch.ones(90, 90).triu(), "not finite": torch.eye(90) / 0}
    for message, gram in wrong.items():
        save_file({**read_model(f"{models[0]}-gram.safetensors"), "wide": gram}, tmp_path / "wrong.safetensors")
        config = make_config(models, "gram")
        config["models"][0]["gram"] = str(tmp_path / "wrong.safetensors")
        with pytest.raises(OpParameterError, match=f"regmean, tensor wide: .*{message}"):
            merge(config, tmp_path / f"out {message}", workers=1)


OWN = """
from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.registry import Base, Statistics, merge_op


def rows(shape):
    return shape[:1] if len(shape) == 2 else None


@merge_op(
    title="Scaled", base=Base.REQUIRED, max_models=1,
    statistics=Statistics("scales", "scales of rows", rows, is_whole=True, is_required=False),
)
def scaled() -> Kernel:
    "The base plus the difference, times a factor for each row."
    return Scaled()


class Scaled(Elementwise):
    def __init__(self):
        super().__init__(print)

    def num_scratch(self, site):
        return 1

    def start(self, site):
        return Run(site)


from raymerge.ops.kernel import KernelRun


class Run(KernelRun):
    def __init__(self, site):
        self.site = site

    def combine(self, block, out):
        import torch

        block.load(1, out).sub_(block.load(0, block.scratch[0]))
        if self.site.num_statistics:
            rows = block.load(2, torch.empty(self.site.shape[0]))
            out.view(self.site.shape).mul_(rows[:, None])
        out.add_(block.scratch[0])
"""


def test_a_method_of_ones_own_takes_some_of_all_but_the_base(models: list[str], tmp_path: Path) -> None:
    (tmp_path / "scaled.py").write_text(OWN)
    scales = {name: torch.arange(float(shape[0])) for name, shape in SHAPES.items() if len(shape) == 2 and shape[0]}
    save_file(scales, tmp_path / "scales.safetensors")
    config: dict[str, Any] = {"merge_method": "scaled", "base_model": models[0]}
    config["models"] = [{"model": models[1], "scales": str(tmp_path / "scales.safetensors")}]
    merge(config, tmp_path / "out", ops=str(tmp_path / "scaled.py"), workers=1)
    base, model, merged = (read_model(place) for place in (models[0], models[1], tmp_path / "out"))
    for name, found in merged.items():
        factors = scales[name][:, None] if name in scales else 1
        torch.testing.assert_close(found, base[name] + factors * (model[name] - base[name]))
