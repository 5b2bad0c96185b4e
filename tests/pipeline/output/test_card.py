from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge import __version__, plan
from raymerge.pipeline.output.card import make_card
from raymerge.pipeline.plan.types import MergePlan
from tests.checkpoints import write_family

NAMES = ("org/base-7B", "org/tuned_1", "some.org/tuned-2")


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Models in directories that are called like repositories of the Hub."""
    for name, model in zip(NAMES, write_family(tmp_path / "made"), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        model.rename(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    return NAMES


def on_hub(the_plan: MergePlan, prefix: str = "hf://") -> MergePlan:
    """Return a plan whose models were found elsewhere under the same names."""
    inputs = (replace(item, url=f"{prefix}{item.model.path}@0123abcd") for item in the_plan.inputs)
    return replace(the_plan, inputs=tuple(inputs))


def read_card(the_plan: MergePlan) -> tuple[dict[str, Any], str]:
    """Return the front matter and the text of a card."""
    before, front, text = make_card(the_plan, the_plan.outputs[0]).split("---\n", 2)
    assert before == ""
    return yaml.safe_load(front), text


def test_front_matter_is_what_the_hub_reads(models: tuple[str, ...]) -> None:
    config = (
        f"merge_method: linear\nmodels: [{{model: {models[1]}}}, {{model: {models[2]}}}]\nparameters: {{weight: 1}}\n"
    )
    front, text = read_card(on_hub(plan(config)))
    assert front == {
        "base_model": [models[1], models[2]],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "raymerge"],
    }
    assert text.startswith("# tuned_1 + tuned-2 (linear)\n")
    assert f"raymerge {__version__}" in text
    assert "[Linear](https://arxiv.org/abs/2203.05482)." in text, "no base is named"
    assert f"- [{models[1]}](https://huggingface.co/{models[1]})" in text
    assert f"```yaml\n{config}```\n" in text


def test_local_paths_are_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    base, tuned = write_family(tmp_path, 1)
    front, text = read_card(
        plan(
            {
                "merge_method": "slerp",
                "base_model": str(base),
                "models": [{"model": str(tuned)}],
                "parameters": {"t": 1},
            }
        )
    )
    assert "base_model" not in front
    assert f"with {base} as base." in text
    assert f"- `{tuned}`" in text
    assert f"- `{base}`" not in text


@pytest.mark.parametrize("prefix", [None, "s3://", "https://host/", "hf://buckets/"])
def test_what_is_only_called_like_a_repository_is_none(models: tuple[str, ...], prefix: str | None) -> None:
    the_plan = plan({"merge_method": "passthrough", "models": [{"model": models[1]}]})
    front, text = read_card(on_hub(the_plan, prefix) if prefix else the_plan)
    assert "base_model" not in front
    assert f"- `{models[1]}`\n" in text
    assert "huggingface.co" not in text


def test_a_repository_is_linked_at_the_revision_that_the_config_names(models: tuple[str, ...]) -> None:
    the_plan = on_hub(plan({"merge_method": "passthrough", "models": [{"model": models[1]}]}))
    model = replace(the_plan.inputs[0].model, revision="refs/pr/1")
    front, text = read_card(replace(the_plan, inputs=(replace(the_plan.inputs[0], model=model),)))
    assert front["base_model"] == [models[1]]
    assert f"- [{models[1]}@refs/pr/1](https://huggingface.co/{models[1]}/tree/refs%2Fpr%2F1)\n" in text


def test_slices_with_bases_of_their_own(models: tuple[str, ...]) -> None:
    sources = [{"model": model, "layer_range": [0, 2]} for model in models[:2]]
    slices = [{"sources": sources, "base_model": base} for base in (models[1], models[0])]
    _, text = read_card(plan({"merge_method": "slerp", "slices": slices, "parameters": {"t": 0.5}}))
    assert f"with {models[1]} and {models[0]} as base." in text or f"with {models[0]} and {models[1]} as base." in text
    assert text.count("\n- `") == 2


def test_the_base_is_the_one_of_the_slice(models: tuple[str, ...]) -> None:
    sources = [{"model": model, "layer_range": [0, 2]} for model in models[:2]]
    slices = [{"sources": sources, "base_model": models[1]}]
    _, text = read_card(plan({"merge_method": "slerp", "slices": slices, "parameters": {"t": 0.5}}))
    assert f"with {models[1]} as base." in text


def test_an_optional_base_is_named_where_there_is_one(tmp_path: Path) -> None:
    base, *tuned = write_family(tmp_path, 2)
    config = {"merge_method": "nuslerp", "models": [{"model": str(m)} for m in tuned], "parameters": {"weight": 1}}
    for more, expected in (({}, "Method: NuSLERP."), ({"base_model": str(base)}, f"with {base} as base.")):
        the_plan = plan({**config, **more})
        assert expected in make_card(the_plan, the_plan.outputs[0])


def test_a_config_with_fences_stays_in_its_own(models: tuple[str, ...]) -> None:
    config = f"# ```\n# ````\nmerge_method: passthrough\nmodels: [{{model: {models[0]}}}]\n"
    _, text = read_card(plan(config))
    assert f"`````yaml\n{config}`````\n" in text


def test_names_that_yaml_would_misread_are_quoted(models: tuple[str, ...]) -> None:
    the_plan = on_hub(plan({"merge_method": "passthrough", "models": [{"model": models[0]}]}))
    front, _ = read_card(replace(the_plan, inputs=(replace(the_plan.inputs[0], url="hf://0/1@0123abcd"),)))
    assert front["base_model"] == ["0/1"]


def test_the_title_names_a_few_models(tmp_path: Path) -> None:
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in write_family(tmp_path, 5)]
    titles = []
    for number in (1, 4, 5, 6):
        _, text = read_card(plan({"merge_method": "linear", "models": models[:number]}))
        titles.append(text.splitlines()[0])
    assert titles == [
        "# base (linear)",
        "# base + tuned1 + tuned2 + tuned3 (linear)",
        "# base + tuned1 + tuned2 + tuned3 and 1 more (linear)",
        "# base + tuned1 + tuned2 + tuned3 and 2 more (linear)",
    ]
