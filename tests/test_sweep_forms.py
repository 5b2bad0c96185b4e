"""Sweeps of every form of merge: each point has the bytes of its own merge, wherever that is made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import raymerge
from raymerge.pipeline.options import MergeOptions
from raymerge.pipeline.spectrum.materialise import materialised
from raymerge.pipeline.spectrum.record import locate_point
from tests import mixtures
from tests.adapters import draw_factors, write_adapter
from tests.checkpoints import read_files
from tests.modular_models import make_llava, save
from tests.steps import entries
from tests.tokenized_models import write_family

MODULE = "model.layers.0.mlp.up_proj"


def tokenizers(tmp_path: Path, **keys: Any) -> dict[str, Any]:
    a, b, c = (str(model) for model in write_family(tmp_path))
    return {"merge_method": "linear", "models": entries(a, b, c), "parameters": {"weight": 1}, **keys}


def write_union(tmp_path: Path) -> tuple[Any, list[str]]:
    return tokenizers(tmp_path, tokenizer={"source": "union", "pad_to_multiple_of": 64}), ["weight[1]=0.5:1.5:0.5"]


def write_sources(tmp_path: Path) -> tuple[Any, list[str]]:
    config = tokenizers(tmp_path, tokenizer={"source": "union"}, base_model=str(tmp_path / "a"))
    return config, ["tokenizer.source=union,base", "tokenizer.pad_to_multiple_of=16,64"]


def write_rows(tmp_path: Path) -> tuple[Any, list[str]]:
    tokens = {"<|im_start|>": {"source": str(tmp_path / "b")}}
    config = tokenizers(tmp_path, tokenizer={"source": "union", "tokens": tokens}, base_model=str(tmp_path / "a"))
    return config, ["weight[1]=0.5,1", "weight[0]=0.5,1"]


def write_documents(tmp_path: Path) -> tuple[Any, list[str]]:
    a, b, c = (str(model) for model in write_family(tmp_path))
    first: dict[str, Any] = {"name": "first", "merge_method": "linear", "models": entries(a, b)}
    first |= {"tokenizer_source": "union", "parameters": {"weight": 0.5}}
    last = {"merge_method": "slerp", "base_model": "first", "models": entries(c), "tokenizer_source": "union"}
    return yaml.safe_dump_all([first, last]), ["t=0.2:0.8:0.3"]


def write_inner(tmp_path: Path) -> tuple[Any, list[str]]:
    """Sweep a document that another one uses."""
    a, b, c = (str(model) for model in write_family(tmp_path))
    first = {"name": "first", "merge_method": "linear", "models": entries(a, b), "parameters": {"weight": 0.5}}
    last = {"merge_method": "slerp", "base_model": "first", "models": entries(c), "parameters": {"t": 0.5}}
    text = {"tokenizer_source": "union"}
    sweep = {"grid": {"weight[1]": [0.25, 0.75]}}
    return yaml.safe_dump_all([first | text | {"sweep": sweep}, last | text]), []


def write_mixture(tmp_path: Path) -> tuple[Any, list[str]]:
    models = mixtures.write_family(tmp_path, "mistral")
    config = mixtures.make_config(models)
    return config, ["experts[0].residual_scale=0.5,1", "experts[1].noise_scale=0,0.1"]


def write_gates(tmp_path: Path) -> tuple[Any, list[str]]:
    models = mixtures.write_family(tmp_path, "mistral")
    return mixtures.make_config(models, gate_mode="cheap_embed"), [
        "experts_per_token=1,2",
        "gate_mode=random,cheap_embed",
    ]


def write_hidden(tmp_path: Path) -> tuple[Any, list[str]]:
    models = mixtures.write_family(tmp_path, "mistral")
    return mixtures.make_config(models, gate_mode="hidden"), ["experts[0].residual_scale=0.5,1"]


def write_modules(tmp_path: Path) -> tuple[Any, list[str]]:
    paths = [save(make_llava, tmp_path / f"m{seed}", seed) for seed in (1, 2)]
    modules = {"text_decoder": {"models": entries(*paths)}, "vision_tower": {"models": entries(paths[0])}}
    config = {"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules}
    return config, ["weight[1]=0.5,1", "modules.text_decoder.parameters.normalize=true,false"]


def write_adapted(tmp_path: Path) -> tuple[Any, list[str]]:
    a, *_ = (str(model) for model in write_family(tmp_path))
    adapters = [write_adapter(tmp_path / f"adapter{k}", draw_factors(MODULE, 32, 16, seed=k)) for k in (0, 1)]
    models = entries(f"{a}+{adapters[0]}", f"{a}+{adapters[1]}")
    config = {"merge_method": "ties", "base_model": a, "models": models, "parameters": {"weight": 1}}
    return config, ["density=0.3,0.7", "weight[0]=0.5,1"]


def write_adapters(tmp_path: Path) -> tuple[Any, list[str]]:
    adapters = [write_adapter(tmp_path / f"adapter{k}", draw_factors(MODULE, 32, 16, seed=k)) for k in (0, 1)]
    models = entries(*adapters)
    config = {"merge_method": "task_arithmetic", "adapter": {}, "models": models, "parameters": {"weight": 1}}
    return config, ["weight[0]=0.5,1", "adapter.rank=1,3"]


def write_ranks(tmp_path: Path) -> tuple[Any, list[str]]:
    config, _ = write_adapters(tmp_path)
    return {**config, "merge_method": "ties"}, ["density=0.3,0.7", "merge_method=ties,dare_ties"]


FORMS = [
    write_union, write_sources, write_rows, write_documents, write_inner, write_mixture, write_gates, write_hidden,
    write_modules, write_adapted, write_adapters, write_ranks,
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__.removeprefix("write_"))
def test_points_have_the_bytes_of_their_own_merges(form: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, sets = form(Path("models"))
    report = raymerge.sweep(config, "s", sets, workers=1)
    assert len(report.spectrum.points) >= 2
    for point in report.spectrum.points:
        alone = tmp_path / "alone" / point.name
        raymerge.merge(point.config, alone, MergeOptions(seed=point.seed, workers=1))
        assert read_files(alone) == read_files(Path(locate_point(report.out, point))), point.name
    monkeypatch.chdir(tmp_path / "alone")
    with materialised(report.out, report.spectrum, replace(point, state="planned")) as made:
        found, expected = read_files(Path(made)), read_files(alone)
    assert found.keys() == expected.keys()
    assert all(found[name] == content for name, content in expected.items() if name.endswith(".safetensors"))
