from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from raymerge.pipeline.config import findings
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.errors import ConfigError
from tests.pipeline.config.samples import LINEAR, MISSING, SLERP, changed


@pytest.mark.parametrize(
    ("form", "change", "warning"),
    [
        ("linear", ("bogus_key", 1), "bogus_key: unknown key, ignored; Allowed: merge_method, models"),
        ("linear", ("random_seed", 3), "random_seed: unknown key, ignored; it is an option of the command: --seed 3"),
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


def test_strict_names_everything_at_once() -> None:
    with pytest.raises(ConfigError, match=r"(?s)bogus: .*models\[0\]\.more: "):
        load_config(changed("linear", ("bogus", 1), ("models.0.more", 2)), strict=True)


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


def test_a_lacking_parameter_below_a_mistyped_key_names_the_key() -> None:
    mistyped = changed("slerp", ("parameters", MISSING), ("paramters", {"t": 0.5}))
    with pytest.raises(
        ConfigError, match=r"needs 't', and nothing gives it; paramters: unknown key; did you mean 'par"
    ):
        load_config(mistyped)


@pytest.mark.parametrize(("value", "hint"), [(50, "; did you mean 0.5?"), (2, ""), (-0.5, "")])
def test_an_interpolation_outside_of_0_to_1_is_doubtful(value: float, hint: str) -> None:
    (warning,) = load_config(changed("slerp", ("parameters.t", value))).warnings
    assert warning == f"parameters.t: {value:g} is not from 0 to 1{hint}"


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


def test_reading_ends_after_many_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(findings, "_MOST", 60)
    with pytest.raises(ConfigError) as caught:
        load_config(LINEAR | {f"key{k}": 1 for k in range(5000)})
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("key0: unknown key")
    assert (len(lines), lines[-1]) == (51, "and 10 more")
