from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.chat_template.builtin import BUILTIN
from raymerge.pipeline.checkpoint.dtypes import OUTPUT_DTYPES
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.sections.chat_template import TemplateChoice
from raymerge.pipeline.config.values import resolve
from raymerge.pipeline.errors import ConfigError
from tests.pipeline.config.samples import LINEAR, MISSING, SLERP, TIES, A, B, C, changed


def weight_of(config: MergeConfig, index: int, tensor: str = "x") -> object:
    entry = config.entries[index]
    return resolve(find_op(config.method).parameters[0], (entry.parameters, config.parameters), tensor, 0.0)


def test_a_models_config() -> None:
    text = yaml.safe_dump(changed("linear", ("dtype", "float16"), ("out_dtype", "torch.bfloat16")))
    config = load_config(text, strict=True)
    assert config.method == "linear"
    assert [entry.model for entry in config.models] == [A, B]
    assert (weight_of(config, 0), weight_of(config, 1)) == (1.0, 3.0)
    assert (config.slices, config.base_model, config.warnings) == ((), None, ())
    assert (config.dtype, config.out_dtype) == ("F16", "BF16")
    assert config.text == text
    assert config.referenced_models == (A, B)


def test_a_slices_config() -> None:
    config = load_config(
        changed("slerp", ("slices.1.base_model", "org/c"), ("slices.0.parameters", {"t": [0, 1]})), strict=True
    )
    assert (config.models, config.entries, config.base_model) == ((), (), A)
    first, second = config.slices
    assert [(s.model, s.layer_range) for s in first.sources] == [(A, (0, 8)), (B, (0, 8))]
    assert [(s.model, s.layer_range) for s in second.sources] == [(C, (2, 6)), (A, (8, 12))]
    assert (first.base_model, second.base_model) == (None, C)
    (t,) = find_op("slerp").parameters
    assert resolve(t, (first.parameters, config.parameters), "x", 0.25) == 0.25
    assert resolve(t, (second.parameters, config.parameters), "x", 0.25) == 0.5
    assert config.referenced_models == (A, B, C)


def test_a_config_survives_pickling() -> None:
    config = load_config(SLERP)
    assert pickle.loads(pickle.dumps(config)) == config


def test_a_file_a_text_and_a_mapping_say_the_same(tmp_path: Path) -> None:
    config = load_config(TIES)
    path = tmp_path / "merge.yml"
    path.write_text(config.text)
    assert load_config(path) == load_config(config.text) == config


def test_the_base_comes_first_among_the_referenced_models() -> None:
    config = load_config(changed("linear", ("base_model", "org/b")))
    assert config.referenced_models == (B, A)
    assert config.warnings == ()


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("org/a", ModelRef("org/a")),
        ("org/a@v1", ModelRef("org/a", "v1")),
        ("./dir/a b", ModelRef("./dir/a b")),
        ("s3://bucket/a", ModelRef("s3://bucket/a")),
        ({"model": "org/a@v1"}, ModelRef("org/a", "v1")),
        ({"model": {"path": "/x+y@z"}}, ModelRef("/x+y@z")),
        ({"model": {"path": "org/a", "revision": "v1"}, "lora": None}, ModelRef("org/a", "v1")),
        ("org/a+org/b", ModelRef("org/a", adapter=ModelRef("org/b"))),
        ("org/a@v1+org/b@v2", ModelRef("org/a", "v1", ModelRef("org/b", "v2"))),
        ("s3://bucket/a+b", ModelRef("s3://bucket/a+b")),
        ("s3://bucket/a+s3://bucket/b", ModelRef("s3://bucket/a", adapter=ModelRef("s3://bucket/b"))),
        ("hf://org/a+org/b", ModelRef("hf://org/a", adapter=ModelRef("org/b"))),
        ({"model": "org/a", "lora": "org/b@v2"}, ModelRef("org/a", adapter=ModelRef("org/b", "v2"))),
        ({"model": {"path": "/x+y"}, "lora": {"path": "/z+w"}}, ModelRef("/x+y", adapter=ModelRef("/z+w"))),
    ],
)
def test_model_references(written: object, expected: ModelRef) -> None:
    config = load_config(changed("linear", ("models.0.model", written)), strict=True)
    assert config.models[0].model == expected


@pytest.mark.parametrize("prefix", ["", "torch."])
@pytest.mark.parametrize("name", OUTPUT_DTYPES)
def test_dtypes_are_named_as_in_headers(name: str, prefix: str) -> None:
    assert load_config(changed("linear", ("dtype", prefix + name))).dtype == OUTPUT_DTYPES[name]


def test_an_unlisted_base_is_an_input_of_linear_and_needs_a_weight() -> None:
    config = load_config(changed("linear", ("base_model", "org/c"), ("parameters.weight", 7)))
    assert [entry.model for entry in config.entries] == [A, B, C]
    assert [weight_of(config, i) for i in range(3)] == [1.0, 3.0, 7.0]
    assert config.warnings == (
        "base_model: org/c is not under `models`, so linear merges it as one more model, after the others; "
        "list it there, or remove base_model",
    )
    assert weight_of(load_config(changed("linear", ("base_model", "org/c"))), 2) is None


def test_an_unlisted_base_is_the_last_entry_of_ties_without_a_warning() -> None:
    config = load_config(TIES, strict=True)
    assert [entry.model for entry in config.entries] == [B, C, A]
    listed = load_config(changed("ties", ("models.2", {"model": "org/a"})), strict=True)
    assert listed.entries == listed.models


def test_only_the_first_slice_and_the_last_may_hold_no_layers() -> None:
    def ranges(*ranges: list[int]) -> dict[str, Any]:
        return {
            "merge_method": "passthrough",
            "slices": [{"sources": [{"model": "org/a", "layer_range": found}]} for found in ranges],
        }

    first, last = load_config(ranges([0, 0], [0, 2], [2, 2])).warnings
    path = (
        "slices[{}].sources[0].layer_range: [{}, {}] holds no layers: of these models comes what stands {} the layers"
    )
    assert first.startswith(path.format(0, 0, 0, "before"))
    assert last.startswith(path.format(2, 2, 2, "after"))
    for refused in (ranges([0, 2], [1, 1], [0, 2]), ranges([0, 0]), ranges([0, 0], [2, 2])):
        with pytest.raises(ConfigError, match=r"layer_range: \[\d, \d\] holds no layers; write \[start, stop\]"):
            load_config(refused)


def test_parameters_that_have_no_effect_are_not_kept() -> None:
    config = load_config(changed("linear", ("models.0.parameters.normalize", False), ("parameters.t", "x")))
    assert set(config.models[0].parameters) == {"weight"}
    assert config.parameters == {}


def test_one_model_spelt_in_two_ways_is_one() -> None:
    spellings = [("org/a", "hf://org/a@main"), ("./x", "x/"), ("s3://b/a", "s3://b/a/"), ("org/a@main", "org/a")]
    for base, other in spellings:
        config = load_config(changed("ties", ("base_model", base), ("models.0.model", other)))
        assert [str(model) for model in config.referenced_models] == [base, "org/c"]
        assert any(warning.startswith(f"models[0].model: {other} is {base}, spelt") for warning in config.warnings)
    different = changed("ties", ("base_model", "org/a"), ("models.0.model", "org/a@v1"))
    assert len(load_config(different, strict=True).referenced_models) == 3


def test_a_revision_may_stand_beside_the_model() -> None:
    config = load_config(changed("linear", ("models.0.revision", "v1"), ("models.1.revision", None)), strict=True)
    assert config.referenced_models == (ModelRef("org/a", "v1"), B)
    source = {"model": "org/c", "revision": "v2", "layer_range": [2, 6]}
    assert load_config(changed("slerp", ("slices.1.sources.0", source)), strict=True).referenced_models[-1] == ModelRef(
        "org/c", "v2"
    )


def test_without_a_base_the_first_model_is_that_of_slerp() -> None:
    whole = {"merge_method": "slerp", "models": [{"model": "org/b"}, {"model": "org/a"}], "parameters": {"t": 0.3}}
    config = load_config(whole, strict=True)
    assert config.base_model == B
    assert config.notes == ("base_model is not given, so the first model, org/b, is the base (t = 0)",)
    sliced = load_config(changed("slerp", ("base_model", MISSING)), strict=True)
    assert [part.base_model for part in sliced.slices] == [A, C]
    assert len(sliced.notes) == 2


def test_without_weights_models_are_averaged() -> None:
    config = load_config({"merge_method": "linear", "models": [{"model": "org/a"}, {"model": "org/b"}]})
    assert (weight_of(config, 0), weight_of(config, 1)) == (1.0, 1.0)
    (warning,) = config.warnings
    assert warning.startswith("models: no weights are given, so all models get the same")
    with pytest.raises(ConfigError, match="linear needs 'weight' for org/b, and nothing gives it"):
        load_config(changed("linear", ("models.1.parameters", MISSING)))


@pytest.mark.parametrize(
    ("written", "expected"),
    [("bf16", "BF16"), ("BF16", "BF16"), ("torch.half", "F16"), ("fp32", "F32"), ("double", "F64"), ("auto", None)],
)
def test_dtypes_as_people_write_them(written: str, expected: str | None) -> None:
    assert load_config(changed("linear", ("dtype", written)), strict=True).dtype == expected


def test_a_method_of_the_slices() -> None:
    own = [{**part, "merge_method": "slerp"} for part in SLERP["slices"]]
    assert load_config({**SLERP, "slices": own}, strict=True).slices == load_config(SLERP).slices
    without = {key: value for key, value in SLERP.items() if key != "merge_method"}
    config = load_config({**without, "slices": own})
    assert config.method == "slerp"
    assert config.warnings[0].startswith("slices[0].merge_method: stands for the whole merge")
    (warning,) = load_config(changed("slerp", ("slices.1.merge_method", "linear"))).warnings
    assert warning.startswith("slices[1].merge_method: has no effect, in mergekit neither: slerp merges all slices")
    with pytest.raises(ConfigError, match="merge_method: is missing"):
        load_config({**without, "slices": [own[0], SLERP["slices"][1]]})


def test_ranges_of_layers_as_people_write_them() -> None:
    config = load_config(changed("slerp", ("slices.0.sources.0.layer_range", ["0", 8.0])), strict=True)
    assert config.slices == load_config(SLERP).slices
    config = load_config(changed("slerp", ("slices.0.sources.0.layer_range", MISSING)), strict=True)
    assert config.slices[0].sources[0].layer_range is None


def test_chat_templates(tmp_path: Path) -> None:
    def choice(written: str) -> TemplateChoice:
        chosen = load_config(changed("linear", ("chat_template", written)), strict=True).chat_template
        assert chosen is not None
        return chosen

    text = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    assert (choice("auto"), choice(text)) == (TemplateChoice("auto", None), TemplateChoice("", text))
    assert choice(" chatml\n") == TemplateChoice("chatml", BUILTIN["chatml"])
    file = tmp_path / "own.jinja"
    file.write_text(text)
    assert choice(str(file)) == TemplateChoice(str(file), text)
    assert [choice(written).is_file for written in ("auto", "chatml", text, str(file))] == [False, False, False, True]
    file.write_text("x" * (2**20 + 1))
    with pytest.raises(ConfigError, match="is larger than 1048576 bytes; this is no chat template"):
        choice(str(file))


def test_a_name_changes_nothing() -> None:
    assert load_config({**LINEAR, "name": "step1"}, strict=True).entries == load_config(LINEAR).entries


def test_an_optional_base_is_among_the_sources_of_a_slice_and_has_no_parameters() -> None:
    sources = [{"model": f"org/{name}", "layer_range": [0, 2], "parameters": {"weight": 1}} for name in "abc"]
    config = {"merge_method": "nuslerp", "slices": [{"sources": sources[:2]}]}
    assert load_config(config, strict=True).base_model is None
    with pytest.raises(ConfigError, match=r"org/c is not among the sources .* its layer_range, or remove base_model"):
        load_config({**config, "base_model": "org/c"})
    (warning,) = load_config({**config, "slices": [{"sources": sources}], "base_model": "org/c"}).warnings
    assert "org/c is the base, and nuslerp takes none for the base" in warning


def test_a_base_is_only_the_donor_where_slices_are_stacked() -> None:
    part: dict[str, Any] = {"sources": [{"model": "org/a", "layer_range": [0, 4]}]}
    stack = {"merge_method": "passthrough", "base_model": "org/b", "slices": [part, part]}
    config = load_config(stack, strict=True)
    assert (config.referenced_models, len(config.slices)) == ((B, A), 2)
    (warning,) = load_config({**stack, "slices": [{**part, "base_model": "org/b"}]}).warnings
    assert warning.startswith("slices[0].base_model: has no effect, because passthrough takes no base")


CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_the_shipped_configs_load(path: Path) -> None:
    config = load_config(path)
    assert config.text == path.read_text()
    assert config.text.startswith("# ")
    unused = [
        f"{path.name}:{line}: models[{i}].parameters.weight: ignored, because slerp does not use 'weight'"
        for i, line in enumerate((5, 8))
    ]
    expected = unused if path.stem == "qwen-deepseek-slerp" else []
    assert [warning.partition(" (")[0] for warning in config.warnings] == expected


def test_the_shipped_configs_show_these_methods() -> None:
    methods = {load_config(path).method for path in CONFIGS}
    assert methods == {"linear", "slerp", "task_arithmetic", "ties", "dare_ties", "passthrough"}


def test_the_shipped_stack_has_48_layers() -> None:
    config = load_config(next(path for path in CONFIGS if path.stem == "passthrough-stack"))
    ranges = [part.sources[0].layer_range for part in config.slices]
    assert ranges == [(0, 24), (12, 36)]


def test_loading_a_config_does_not_import_torch() -> None:
    load = "from raymerge.pipeline.config.reader import load_config; load_config(pathlib.Path(sys.argv[1]))"
    code = f"import pathlib, sys; {load}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code, CONFIGS[0]], capture_output=True, text=True, check=True)
    assert "raymerge.ops.linear" in run.stdout.split()
    assert "torch" not in run.stdout.split()
