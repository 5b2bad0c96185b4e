from __future__ import annotations

import copy
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
from raymerge.pipeline.config import findings
from raymerge.pipeline.config.chat_template import TemplateChoice
from raymerge.pipeline.config.merge_config import MergeConfig
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.values import resolve
from raymerge.pipeline.errors import ConfigError

A, B, C = ModelRef("org/a"), ModelRef("org/b"), ModelRef("org/c")
LINEAR: dict[str, Any] = {
    "merge_method": "linear",
    "models": [{"model": "org/a", "parameters": {"weight": 1}}, {"model": "org/b", "parameters": {"weight": 3}}],
}
TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/a",
    "models": [{"model": "org/b", "parameters": {"weight": 1}}, {"model": "org/c", "parameters": {"weight": 1}}],
}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "base_model": "org/a",
    "slices": [
        {"sources": [{"model": "org/a", "layer_range": [0, 8]}, {"model": "org/b", "layer_range": [0, 8]}]},
        {"sources": [{"model": "org/c", "layer_range": [2, 6]}, {"model": "org/a", "layer_range": [8, 12]}]},
    ],
    "parameters": {"t": 0.5},
}
FORMS = {"linear": LINEAR, "ties": TIES, "slerp": SLERP}
MISSING = object()


def changed(form: str, *changes: tuple[str, object]) -> dict[str, Any]:
    """Return one of the configs above with the values at some paths (`models.1.parameters.weight`) changed."""
    config: Any = copy.deepcopy(FORMS[form])
    for path, value in changes:
        *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
        place = config
        for key in parents:
            place = place[key] if isinstance(key, int) else place.setdefault(key, {})
        if value is MISSING:
            del place[last]
        elif isinstance(last, int) and last == len(place):
            place.append(value)
        else:
            place[last] = value
    return config  # type: ignore[no-any-return]


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


@pytest.mark.parametrize(
    ("form", "change", "warning"),
    [
        ("linear", ("bogus_key", 1), "bogus_key: unknown key, ignored; Allowed: merge_method, models"),
        ("linear", ("dtpye", "float16"), "dtpye: unknown key, ignored; did you mean 'dtype'?"),
        ("linear", ("normalize", False), "normalize: unknown key, ignored; it is a parameter; move it under"),
        ("linear", ("models.0.weight", 1), "models[0].weight: unknown key, ignored; it is a parameter"),
        ("linear", ("models.1.layer_range", [0, 1]), "models[1].layer_range: unknown key"),
        (
            "linear",
            ("models.1.parameters.wieght", 1),
            "models[1].parameters.wieght: unknown parameter, ignored; did you mean 'weight'? Allowed: weight, norm",
        ),
        (
            "linear",
            ("models.1.parameters.normalize", False),
            "models[1].parameters.normalize: ignored, because linear has one 'normalize' for all models",
        ),
        (
            "linear",
            ("parameters.t", 0.5),
            "parameters.t: ignored, because linear does not use 't' (it belongs to nearswap, slerp); "
            "its parameters are: weight, normalize",
        ),
        ("ties", ("models.0.parameters.density", 1.5), "models[0].parameters.density: 1.5 is not from 0 to 1"),
        ("ties", ("parameters.density", [0.5, 3]), "parameters.density: 3 is not from 0 to 1"),
        (
            "ties",
            ("models.2", {"model": "org/a", "parameters": {"weight": 1}}),
            "models[2].parameters: ignored (weight)",
        ),
        ("linear", ("models.0.model", {"model": "x", "lorra": 1}), "models[0].model.lorra: unknown key, ignored; did"),
        (
            "linear",
            ("models.0.model", {"model": "x", "override_architecture": "Y"}),
            "models[0].model.override_architecture: has no effect",
        ),
        ("linear", ("parameters.weight", {"filtre": "x", "value": 1}), "parameters.weight.filtre: unknown key"),
        ("slerp", ("slices.0.residual_weight", 0.5), "slices[0].residual_weight: has no effect"),
        ("slerp", ("slices.0.sorces", []), "slices[0].sorces: unknown key, ignored; did you mean 'sources'?"),
        ("slerp", ("slices.0.sources.1.parameters", {"t": 1}), "slices[0].sources[1].parameters.t: ignored"),
        ("slerp", ("slices.0.sources.1.t", 1), "slices[0].sources[1].t: unknown key, ignored; it is a parameter"),
    ],
)
def test_what_is_probably_a_mistake_warns_and_is_refused_when_strict(
    form: str, change: tuple[str, object], warning: str
) -> None:
    config = changed(form, change)
    (given,) = load_config(config).warnings
    assert given.startswith(warning)
    with pytest.raises(ConfigError) as refused:
        load_config(config, strict=True)
    assert given in str(refused.value)


def test_a_density_of_1_is_fine() -> None:
    load_config(changed("ties", ("parameters.density", [0.2, 1])), strict=True)


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


def test_strict_names_everything_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)bogus: .*models\[0\]\.more: "):
        load_config(changed("linear", ("bogus", 1), ("models.0.more", 2)), strict=True)


def test_parameters_that_have_no_effect_are_not_kept() -> None:
    config = load_config(changed("linear", ("models.0.parameters.normalize", False), ("parameters.t", "x")))
    assert set(config.models[0].parameters) == {"weight"}
    assert config.parameters == {}


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        ("linear", ("merge_method", MISSING), "merge_method: is missing"),
        ("linear", ("merge_method", 3), "merge_method: 3 is given, a string"),
        ("linear", ("parameters.parameters", {"t": 1}), 'parameters.parameters: {"t": 1} is no value of a parameter'),
        ("linear", ("parameters.x", [1, {"value": 2}]), "parameters.x: .* is no value of a parameter"),
        ("linear", ("merge_method", "liner"), "merge_method: 'liner' is unknown; did you mean 'linear'"),
        ("linear", ("models", MISSING), "no models are given"),
        ("linear", ("models", []), "models is empty"),
        ("linear", ("models", {"org/a": 1}), "models: .* a list is needed"),
        ("linear", ("slices", SLERP["slices"]), "models and slices are given"),
        ("linear", ("models.0", "org/a"), r"models\[0\]: .* write `- model: org/a`"),
        ("linear", ("models.0", None), r"models\[0\]: the entry is empty"),
        ("linear", ("models.0", 3), r"models\[0\]: 3 is given, a mapping"),
        ("linear", ("models.0.parameters", [1]), r"models\[0\]\.parameters: \[1\] is given, a mapping"),
        ("linear", ("models.0.parameters.weight", True), r"models\[0\]\.parameters\.weight: true is given"),
        ("linear", ("models.0.parameters.weight", float("nan")), r"models\[0\]\.parameters\.weight: .*finite"),
        ("linear", ("parameters.weight", float("-inf")), r"parameters\.weight: .*finite"),
        ("linear", ("parameters.weight", {"filter": "regex:[", "value": 1}), r"parameters\.weight\.filter: .*regular"),
        ("linear", ("models.1.model", "org/a"), r"models\[1\]\.model: org/a is listed already, as models\[0\]"),
        ("linear", ("models.1.model", {"model": {"path": "org/a"}}), "listed already"),
        ("linear", ("models.0.model", MISSING), r"models\[0\]\.model: no model is named"),
        ("linear", ("models.0.model", ""), r"models\[0\]\.model: the string is empty"),
        ("linear", ("models.0.model", 7), r"models\[0\]\.model: 7 is given, .* quotes"),
        ("linear", ("models.0.model", "a+b+c"), r"models\[0\]\.model: 'a\+b\+c' names 2 adapters, and one is expected"),
        ("linear", ("models.0.model", "a+"), r"models\[0\]\.model: 'a\+' lacks a path \(`model@revision\+adapter@rev"),
        ("linear", ("models.0.model", "a+b@"), r"models\[0\]\.model: 'a\+b@' lacks a revision"),
        ("linear", ("models.0.model", "a@b@c"), r"models\[0\]\.model: .* more than one `@`"),
        ("linear", ("models.0.model", "a@"), "lacks a revision"),
        ("linear", ("models.0.model", "@b"), "lacks a path"),
        ("linear", ("models.0.model", {"lora": None}), r"models\[0\]\.model: `model` is missing"),
        ("linear", ("models.0.revision", 1), r"models\[0\]\.revision: 1 is given, a string"),
        (
            "linear",
            ("models.0", {"model": "a/b@v1", "revision": "v2"}),
            r"\[0\]\.revision: 'v2' is given, and 'v1' with the",
        ),
        ("linear", ("models.0.model", {"model": {"revision": "x"}}), r"models\[0\]\.model\.model\.path: nothing"),
        ("linear", ("models.0.model", {"model": {"path": "x", "revision": 12}}), r"revision: 12 is given, .* quotes"),
        (
            "linear",
            ("models.0.model", {"model": "x+z", "lora": {"path": "y"}}),
            r"models\[0\]\.model\.lora: an adapter is given twice: z is in \"x\+z\"",
        ),
        ("linear", ("models.0.model", {"model": "x", "lora": "y+z"}), r"model\.lora: \"y\+z\" names two adapters"),
        ("linear", ("dtype", "bfloat"), "dtype: 'bfloat' is no dtype .* did you mean 'bfloat16'"),
        ("linear", ("integers", "min"), "integers: .min. is given; write `equal` to refuse"),
        ("linear", ("keep_float32", "*.A_log"), "keep_float32: .* is given, a list is needed"),
        ("linear", ("keep_float32", [1]), r"keep_float32\[0\]: 1 is given, a string is needed"),
        ("linear", ("out_dtype", "flaot16"), "out_dtype: 'flaot16' .* did you mean 'float16'"),
        ("linear", ("dtype", "int64"), "dtype: 'int64' is no dtype .* Allowed: float64, float32, float16, bfloat16"),
        ("linear", ("dtype", 16), "dtype: 16 is given, a string"),
        ("linear", ("chat_template", "chatlm"), "chat_template: 'chatlm' is no chat template; did you mean 'chatml'"),
        ("linear", ("chat_template", "{{ x }}"), "chat_template: .* is no chat template"),
        ("linear", ("chat_template", "no/such.jinja"), "chat_template: cannot read no/such.jinja: No such file"),
        ("linear", ("chat_template", 3), "chat_template: 3 is given, a string"),
        ("linear", ("tokenizer", "union"), "tokenizer: .union. is given, a mapping"),
        ("linear", ("tokenizer", {"tokens": ["<s>"]}), r"tokenizer\.tokens: .* is given, a mapping"),
        ("linear", ("tokenizer", {"tokens": {"": {}}}), r"tokenizer\.tokens: a token is empty"),
        ("linear", ("tokenizer", {"tokens": {"<s>": {"source": "org/z"}}}), r"<s>: org/z is none of the models"),
        ("linear", ("tokenizer", {"tokens": {"<s>": {"force": "yes"}}}), r"<s>\.force: .yes. is given; write true"),
        ("linear", ("tokenizer", {"tokens": {"<s>": {"force": 1}}}), r"<s>\.force: 1 is given; write true"),
        ("linear", ("tokenizer", {"tokens": {"a": {"source": {"kind": "one"}}}}), r"a\.source\.kind: .one. is given"),
        (
            "linear",
            ("tokenizer", {"tokens": {"a": {"source": {"kind": "model_token", "model": "org/a"}}}}),
            r"a\.source: give one of `token` and `token_id`",
        ),
        (
            "linear",
            ("tokenizer", {"tokens": {"a": {"source": {"kind": "model_token", "model": "org/a", "token_id": -1}}}}),
            r"a\.source\.token_id: -1 is given",
        ),
        ("linear", ("tokenizer", {"pad_to_multiple_of": 0}), r"pad_to_multiple_of: 0 is given; write a whole number"),
        ("ties", ("base_model", MISSING), "base_model: ties needs a base model; add `base_model: <the model"),
        ("ties", ("base_model", ""), "base_model: the string is empty"),
        ("slerp", ("base_model", "org/d"), r"slices\[0\]\.sources: the base model org/d is not among the sources"),
        ("slerp", ("slices.0.base_model", "org/c"), r"slices\[0\]\.sources: the base model org/c is not among"),
        ("slerp", ("slices.1.sources.0.model", "org/a"), r"slices\[1\]\.sources: .* listed 2 times"),
        ("slerp", ("slices.0.sources", []), r"slices\[0\]\.sources: no sources"),
        ("slerp", ("slices.0.sources", "x"), r"slices\[0\]\.sources: .* a list"),
        ("slerp", ("slices.1.sources.2", {"model": "x", "layer_range": [0, 4]}), "exactly 1 .* 2 are given"),
        ("slerp", ("slices.1.sources.0", MISSING), r"slices\[1\]\.sources: slerp takes exactly 1 .* none is given"),
        (
            "slerp",
            ("slices.1.sources.1.layer_range", [8, 13]),
            r"slices\[1\]\.sources\[1\]\.layer_range: \[8, 13\] is 5",
        ),
        ("slerp", ("slices.0.sources.0.layer_range", [4, 4]), r"\[0, 8\] is 8 layers, but the first source"),
        ("slerp", ("slices.0.sources.0.layer_range", [4, 3]), r"\[4, 3\] holds no layers"),
        ("slerp", ("slices.0.sources.0.layer_range", [-1, 4]), r"\[-1, 4\] holds no layers"),
        ("slerp", ("slices.0.sources.0.layer_range", [0, 4, 8]), r"\[0, 4, 8\] is given"),
        ("slerp", ("slices.0.sources.0.layer_range", [False, True]), r"\[false, true\] is given"),
        ("slerp", ("slices.0.sources.0.layer_range", [0, 8.5]), r"\[0, 8.5\] is given"),
        ("slerp", ("slices.0.sources.0.layer_range", "0-8"), '"0-8" is given'),
    ],
)
def test_what_cannot_be_is_refused_with_its_path(form: str, change: tuple[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(changed(form, change))


@pytest.mark.parametrize(
    ("modules", "message"),
    [
        ({"text": {"models": []}}, r"modules\.text: models is empty"),
        ({"text": {}}, r"modules\.text: no models are given"),
        ({"text": {"models": LINEAR["models"], "slices": [{}]}}, r"modules\.text: models and slices are given"),
        ({"text": {"models": LINEAR["models"]}, "vision": {}}, r"modules\.vision: no models are given"),
        ({"text": {"models": LINEAR["models"]}, "vision": [1]}, r"modules\.vision: .* a mapping"),
        (["text"], "modules: .* a mapping"),
        ({"text": {"modles": LINEAR["models"]}}, r"modules\.text\.modles: unknown key; did you mean 'models'"),
    ],
)
def test_modules_that_cannot_be(modules: object, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config({"merge_method": "linear", "parameters": {"weight": 1}, "modules": modules})


def test_the_default_module_is_the_whole_model() -> None:
    inner = {"parameters": {"t": {"filter": "mlp", "value": 0.1}}, "slices": SLERP["slices"]}
    outer = {"merge_method": "slerp", "base_model": "org/a", "parameters": {"t": 0.9}}
    config = load_config({**outer, "modules": {"default": inner}}, strict=True)
    (t,) = find_op("slerp").parameters
    assert config.slices == load_config(SLERP).slices
    assert [resolve(t, (config.parameters,), name, 0.0) for name in ("mlp.up", "norm")] == [0.1, 0.9]
    assert config.notes == ()
    run = {"merge_method": "linear", "modules": {"default": {"models": LINEAR["models"]}}}
    assert load_config(run, strict=True).models == load_config(LINEAR).models


def test_modules_have_models_and_parameters_of_their_own(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(
        "merge_method: ties\nbase_model: b\nparameters: {weight: 0.5, density: 1}\ncopy_rest_from: vl\nmodules:\n"
        "  text_decoder:\n    parameters: {density: 0.2}\n    models: [{model: a}, {model: vl}]\n"
        "  vision_tower: {models: [{model: c}]}\n"
        "  visual.merger: {models: [{model: b}]}\n"
    )
    config = load_config(path, strict=True)
    text, _, _ = config.modules
    assert (config.models, config.slices, str(config.copy_rest_from)) == ((), (), "vl")
    assert [str(model) for model in config.referenced_models] == ["vl", "b", "a", "c"]
    assert [entry.model.path for entry in text.models] == ["a", "vl"]
    density = next(parameter for parameter in find_op("ties").parameters if parameter.name == "density")
    assert [resolve(density, (part.parameters,), "w", 0.0) for part in config.modules] == [0.2, 1, 1]
    assert [part.place for part in config.modules] == [
        "merge.yml:6: modules.text_decoder",
        "merge.yml:9: modules.vision_tower",
        "merge.yml:10: modules.visual.merger",
    ]
    assert [part.is_copied for part in config.modules] == [False, False, True], "ties of the base alone"


@pytest.mark.parametrize(
    ("method", "more", "is_copied"),
    [
        ("linear", {}, True),
        ("linear", {"parameters": {"weight": 1}}, False),
        ("passthrough", {}, False),
        ("nuslerp", {}, True),
        ("karcher", {}, False),
        ("slerp", {"base_model": "a", "parameters": {"t": 0.5}}, False),
        ("slerp", {"base_model": "b", "parameters": {"t": 0.5}}, True),
    ],
)
def test_a_module_of_one_model_needs_no_more_than_that(method: str, more: dict[str, Any], is_copied: bool) -> None:
    both = [{"model": "a"}, {"model": "b"}] if method != "passthrough" else [{"model": "a"}]
    weights = {"parameters": {"weight": 1}} if method in ("linear", "nuslerp") else {}
    modules = {"text": {"models": both, **weights}, "vision": {"models": [{"model": "b"}]}}
    config = load_config({"merge_method": method, **more, "modules": modules})
    assert [part.is_copied for part in config.modules] == [False, is_copied]


def test_modules_that_leave_nothing_to_merge() -> None:
    modules = {name: {"models": [{"model": "a"}]} for name in ("text", "vision")}
    with pytest.raises(
        ConfigError, match="each module has one model, and nuslerp merges more; write `merge_method: pa"
    ):
        load_config({"merge_method": "nuslerp", "parameters": {"weight": 1}, "modules": modules})


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


@pytest.mark.parametrize(
    ("method", "base", "models", "message"),
    [
        ("nearswap", None, "a b", "base_model: nearswap needs a base model; add `base_model: org/a`"),
        ("slerp", "a", "a", "models: slerp takes exactly 1 model besides the base, none is given"),
        ("slerp", "a", "a b c", r"models: slerp takes exactly 1 .* 2 are given \(org/b, org/c\)"),
        ("slerp", "a", "b c", "models: slerp takes exactly 1 .* 2 are given"),
        ("model_stock", "a", "a b", "models: model_stock takes at least 2 models besides the base, 1 is given"),
        ("nuslerp", None, "a", "models: nuslerp takes exactly 2 models, 1 is given"),
        ("nuslerp", None, "a b c", "models: nuslerp takes exactly 2 models, 3 are given"),
        ("nuslerp", "d", "a b c", "models: nuslerp takes exactly 2 models besides the base, 3 are given"),
        (
            "nuslerp",
            "a",
            "a b",
            r"models: nuslerp takes exactly 2 .* 1 is given \(org/b\); remove base_model to merge it",
        ),
        ("multislerp", "a", "a", "models: multislerp takes at least 1 model.* besides the base, none is given"),
        ("passthrough", None, "a b", "models: passthrough takes exactly 1 model, 2 are given"),
        ("passthrough", "b", "a", r"models: passthrough takes exactly 1 model, 2 .* base_model org/b .* remove it"),
    ],
)
def test_the_wrong_number_of_models_is_refused(method: str, base: str | None, models: str, message: str) -> None:
    config = {"merge_method": method, "models": [{"model": f"org/{name}"} for name in models.split()]}
    with pytest.raises(ConfigError, match=message):
        load_config({**config, "base_model": f"org/{base}"} if base else config)


@pytest.mark.parametrize(
    ("method", "base", "models"),
    [
        ("slerp", "a", "a b"),
        ("slerp", "a", "b"),
        ("nuslerp", None, "a b"),
        ("nuslerp", "c", "a b"),
        ("nuslerp", "c", "a c b"),
        ("ties", "a", "a"),
        ("passthrough", None, "a"),
        ("linear", "a", "a"),
    ],
)
def test_the_right_number_of_models_is_accepted(method: str, base: str | None, models: str) -> None:
    config: dict[str, Any] = {"merge_method": method, "models": [{"model": f"org/{name}"} for name in models.split()]}
    config["parameters"] = {p.name: 0.5 for p in find_op(method).parameters if p.default is None}
    load_config({**config, "base_model": f"org/{base}"} if base else config, strict=True)


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


SIX_MISTAKES = """\
merge_method: ties
base_modl: org/a
models:
  - model: org/b
    parameters:
      wieght: 0.5
  - model: org/c+a+b
    weight: 0.5  # under the model itself
  - &d
    model: org/d
    parameters: {weight: heavy, density: 1.5}
dtype: b16
bogus: 1
"""


def test_all_mistakes_are_told_at_once_each_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "merge.yml"
    path.write_text(SIX_MISTAKES)
    with pytest.raises(ConfigError) as refused:
        load_config(path)
    told = str(refused.value).splitlines()
    lines = SIX_MISTAKES.splitlines()
    numbers = []
    for message, shown in zip(told[::2], told[1::2], strict=True):
        place, number, _ = message.split(":", 2)
        assert place == str(path)
        assert shown == f"{number:>5} | {lines[int(number) - 1]}"
        numbers.append(int(number))
    assert numbers == [2, 6, 7, 11, 12, 8, 11, 13], "errors in the order of the file, then warnings"
    assert [message.split(": ")[1] for message in told[::2]] == [
        "base_modl",
        "models[0].parameters.wieght",
        "models[1].model",
        "models[2].parameters.weight",
        "dtype",
        "warning",
        "warning",
        "warning",
    ]
    assert told[0] == f"{path}:2: base_modl: unknown key; did you mean 'base_model'?"


@pytest.mark.parametrize(
    ("form", "changes", "message"),
    [
        (
            "linear",
            (("merge_method", MISSING), ("merge_methd", "linear")),
            "merge_methd: unknown key; did you mean 'mer",
        ),
        ("linear", (("models", MISSING), ("modles", LINEAR["models"])), "modles: unknown key; did you mean 'models'?"),
        ("linear", (("models.0.model", MISSING), ("models.0.modell", "x")), "models[0].modell: unknown key; did you"),
        ("ties", (("base_model", MISSING), ("base", "org/a")), "base: unknown key; did you mean 'base_model'?"),
        (
            "ties",
            (("models.0.parameters", {"wieght": 1}),),
            "models[0].parameters.wieght: unknown key; did you mean 'weight'?",
        ),
        (
            "ties",
            (("models.0", {"model": "org/b", "weight": 1}),),
            "models[0].weight: unknown key; it is a parameter; move it under `parameters`",
        ),
        (
            "ties",
            (("models", [{"model": "org/b"}, {"model": "org/c"}]), ("parameters", {"wheight": 1})),
            "parameters.wheight: unknown key; did you mean 'weight'?",
        ),
        (
            "slerp",
            (("parameters", MISSING), ("t", 0.5)),
            "t: unknown key; it is a parameter; move it under `parameters`",
        ),
        (
            "slerp",
            (("slices.0.sources", MISSING), ("slices.0.source", [])),
            "slices[0].source: unknown key; did you me",
        ),
        (
            "slerp",
            (("slices.0.sources.0.layer_range", MISSING), ("slices.0.sources.0.layer_rnge", [0, 8])),
            "slices[0].sources[0].layer_rnge: unknown key; did you mean 'layer_range'?",
        ),
    ],
)
def test_a_misspelt_key_is_told_instead_of_what_it_leaves_missing(
    form: str, changes: tuple[tuple[str, object], ...], message: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(changed(form, *changes))
    (told,) = str(refused.value).splitlines()
    assert told.startswith(message)


@pytest.mark.parametrize(
    ("form", "change", "message"),
    [
        (
            "ties",
            ("models", [{"model": f"org/{k}"} for k in range(5)]),
            "models[0].parameters: ties needs 'weight' for org/0, org/1, org/2 and 2 more, and nothing gives it; add "
            "it under the model's `parameters`, or at the top for all models",
        ),
        (
            "slerp",
            ("parameters", MISSING),
            "parameters: slerp needs 't', and nothing gives it; add it to the top-level",
        ),
        ("linear", ("experts", []), "merge_method: \"linear\" is given, and experts make a mixture; write 'moe'"),
        (
            "linear",
            ("merge_method", "core_space"),
            "merge_method: mergekit has core_space, and raymerge not yet. It has: ",
        ),
        ("linear", ("dtype", "float8"), "dtype: 'float8' is no dtype that a merge can be written in; Allowed: float64"),
    ],
)
def test_what_is_missing_or_not_there_yet_is_told_once(form: str, change: tuple[str, object], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        load_config(changed(form, change))
    (told,) = str(refused.value).splitlines()
    assert told.startswith(message)


def test_an_interpolation_outside_of_0_to_1_is_doubtful() -> None:
    (warning,) = load_config(changed("slerp", ("parameters.t", 50))).warnings
    assert warning == ("parameters.t: 50 is not from 0 to 1; did you mean 0.5?")


def test_warnings_name_the_file_and_the_line(tmp_path: Path) -> None:
    """But not the directory: they get into the output's manifest."""
    text = "bogus: 1\n" + yaml.safe_dump(LINEAR)
    (tmp_path / "merge.yml").write_text(text)
    (in_file,) = load_config(tmp_path / "merge.yml").warnings
    assert in_file.startswith("merge.yml:1: bogus: unknown key")
    (in_text,) = load_config(text).warnings
    assert in_text.startswith("line 1: bogus: unknown key")
    with pytest.raises(ConfigError) as refused:
        load_config(tmp_path / "merge.yml", strict=True)
    first, second, shown = str(refused.value).splitlines()
    assert first == "refused because of strict:"
    assert second.startswith(f"{tmp_path}/merge.yml:1: bogus: unknown key")
    assert shown == "    1 | bogus: 1"


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


def test_reading_ends_after_many_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "_MOST", 60)
    with pytest.raises(ConfigError) as caught:
        load_config(LINEAR | {f"key{k}": 1 for k in range(5000)})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("key0: unknown key")
    assert (len(lines), lines[-1]) == (51, "and 10 more")
