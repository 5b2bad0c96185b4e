"""The JSON Schema, by the validator that editors' go by: it takes what `--strict` takes, and little else."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import jsonschema
import pytest
import yaml

from raymerge.ops.registry import Op, load_ops
from raymerge.pipeline.cli.methods import make_example
from raymerge.pipeline.config import mixture, reader
from raymerge.pipeline.config.document import read_documents
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.config.schema.schema import make_schema
from raymerge.pipeline.config.sections.search import SEARCH
from raymerge.pipeline.config.sections.sweep import SWEEP
from raymerge.pipeline.config.sections.training_run import RUN_KEYS
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.spectrum.points import make_points
from tests.commands import Cli
from tests.documents import PAGES, ROOT, read_blocks
from tests.fuzz.mutation import NUMBERS, VALUES, YAML_VALUES, dump, mutate, parse_pairs

OPS = list(load_ops().values())
SCHEMA = make_schema(OPS)
VALIDATOR = jsonschema.Draft202012Validator(SCHEMA)
FILES = sorted(
    file for place in (ROOT / "configs", ROOT / "docs") for file in place.rglob("*.yml") if "clusters" not in file.parts
)
BLOCKS = [
    pytest.param(text, id=f"{page} {number}")
    for page in PAGES
    for number, text in enumerate(read_blocks(page, "yaml"))
    if "merge_method" in text
]

TIES: dict[str, Any] = {
    "merge_method": "ties",
    "base_model": "org/a@main",
    "models": [
        {"model": "org/a", "revision": "main"},
        {"model": {"model": {"path": "./b+c", "revision": "v1"}}, "parameters": {"weight": "1e-1"}},
        {"model": {"path": "org/c"}, "parameters": {"weight": [0, 0.5, 1]}},
    ],
    "parameters": {
        "density": [{"filter": "mlp", "value": [0.5, 0.7]}, {"value": 0.3}],
        "lambda": {"filter": "regex:layers\\.[0-3]\\.", "value": 0.9},
        "normalize": True,
    },
    "dtype": "auto",
    "out_dtype": "torch.half",
    "name": "step1",
    "keep_float32": ["*.A_log"],
    "integers": "max",
    "tokenizer": {
        "source": "org/c",
        "tokens": {
            "<s>": {"source": {"kind": "zero"}, "force": True},
            "<x>": {"source": {"kind": "model_token", "model": "org/c", "token": "</s>"}},
            "<y>": {"source": {"kind": "model_token", "model": "org/c", "token_id": 7}},
            "<z>": {"source": "org/c"},
            "<new>": None,
        },
        "pad_to_multiple_of": 64,
    },
}
SLERP: dict[str, Any] = {
    "merge_method": "slerp",
    "slices": [
        {
            "sources": [{"model": "org/a", "layer_range": [0, 8]}, {"model": "org/b", "layer_range": [0, 8]}],
            "base_model": "org/a",
            "parameters": {"t": 0.5},
        }
    ],
    "keep_float32": True,
    "tokenizer_source": "union",
}
MIXTURE: dict[str, Any] = {
    "base_model": "org/a",
    "gate_mode": "cheap_embed",
    "experts": [
        {"source_model": "org/b", "positive_prompts": ["code"], "negative_prompts": [], "noise_scale": "1e-3"},
        {"source_model": {"path": "org/c"}, "positive_prompts": ["prose"], "residual_scale": 0.5},
    ],
    "shared_experts": [{"source_model": "org/a"}],
    "experts_per_token": 1,
    "architecture": "mixtral",
    "dtype": "bfloat16",
    "name": "mixture",
}


def find_problems(config: Any) -> list[str]:
    return [f"{error.json_path}: {error.message}" for error in VALIDATOR.iter_errors(config)]


def test_is_a_schema() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    references = {part.split('"')[0] for part in json.dumps(SCHEMA).split('"#/$defs/')[1:]}
    assert references <= SCHEMA["$defs"].keys()
    assert all(name.replace("-", "").replace("_", "").replace(".", "").isalnum() for name in references)


def test_has_every_key_of_a_training_run() -> None:
    run = {"glob": "s3://bucket/run/step-*", "steps": [0, 9], "every": 2, "last": 3, "schedule": "linear", "decay": 0.5}
    assert run.keys() == RUN_KEYS
    config = {"merge_method": "linear", "models": run}
    assert find_problems(config) == []
    for key, wrong in {"glob": "", "steps": [1], "every": 0, "last": "all", "schedule": "cosine", "decay": 0}.items():
        assert find_problems(config | {"models": run | {key: wrong}}), key
    assert find_problems(config | {"models": run | {"frist": 1}})


def test_takes_modules() -> None:
    body = {key: value for key, value in SLERP.items() if key in ("slices", "parameters")}
    config = {"merge_method": "slerp", "modules": {"text_decoder": body, "vision_tower": body}, "copy_rest_from": "a"}
    assert find_problems(config) == []
    load_config(config, strict=True)
    wrong: tuple[dict[str, Any], ...] = (
        {},
        {"a": {}},
        {"a": body | {"layers": 1}},
        {"a": body, "b": body | {"parameters": {"weight": 1}}},
    )
    for modules in wrong:
        assert find_problems(config | {"modules": modules}), modules


def test_takes_mixtures() -> None:
    config = MIXTURE
    for given in (config, config | {"merge_method": "moe", "gate_mode": None}):
        assert find_problems(given) == []
        load_config(given, strict=True)
    changes: dict[str, Any] = {
        "base_model": None,
        "experts": [],
        "gate_mode": "hiden",
        "experts_per_token": 0,
        "merge_method": "ties",
        "parameters": {},
        "shared_experts": [{"model": "org/a"}],
    }
    for key, wrong in changes.items():
        assert find_problems(config | {key: wrong}), key
    bare = [{"source_model": "org/b"}, {"source_model": "org/c"}]
    assert find_problems(config | {"experts": bare})
    assert find_problems(config | {"experts": bare, "gate_mode": "random"}) == []


def test_has_every_key_that_is_supported() -> None:
    assert SCHEMA["$defs"]["merge"]["properties"].keys() == {*reader.KEYS, SWEEP, SEARCH}
    assert SCHEMA["$defs"]["mixture"]["properties"].keys() == {*mixture.KEYS, SWEEP, SEARCH}


def test_takes_sweeps() -> None:
    sweep = {
        "grid": {"t": "0.1:0.9:0.1", "weight[1]": [0.5, [0, 1]], "density": 0.5},
        "zip": {"merge_method": ["ties", "dare_ties"], "parameters.lambda": [1, 0.5]},
        "points": {"flat": {"t": 0.5}, "by-filter": {"t": [{"filter": "mlp", "value": 1}, {"value": 0}]}},
    }
    assert find_problems(TIES | {"sweep": sweep}) == []
    bare = {key: value for key, value in SLERP.items() if key != "parameters"}
    assert find_problems(bare | {"sweep": {"grid": {"t": "0:1:0.5"}}}) == []
    mistakes: list[Any] = [
        {"gird": {}},
        {"grid": {"t": []}},
        {"points": {"a b": {"t": 1}}},
        {"points": {"a": {}}},
        {},
        [],
    ]
    for wrong in mistakes:
        assert find_problems(TIES | {"sweep": wrong}), wrong


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_takes_the_configs_that_are_shipped(file: Path) -> None:
    contents = list(yaml.safe_load_all(file.read_text()))
    problems = [problem for content in contents for problem in find_problems(content)]
    if SWEEP in contents[0]:
        assert make_points(file, (), 0).points
        assert not problems
    else:
        config = load_config(file)
        assert len(problems) == len(config.warnings), (problems, config.warnings)


@pytest.mark.parametrize("text", BLOCKS)
def test_takes_those_of_the_docs(text: str) -> None:
    for config in yaml.safe_load_all(text):
        known = config["merge_method"] in (*load_ops(), "moe")
        assert bool(find_problems(config)) != known


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_takes_the_example_of_each_method(op: Op) -> None:
    assert find_problems(yaml.safe_load(make_example(op))) == []


@pytest.mark.parametrize("config", [TIES, SLERP], ids=["ties", "slerp"])
def test_takes_all_forms_of_values(config: dict[str, Any]) -> None:
    load_config(config, strict=True)
    assert find_problems(config) == []


@pytest.mark.parametrize("op", [op for op in OPS if op.parameters], ids=lambda op: op.name)
def test_knows_where_parameters_go(op: Op) -> None:
    example = yaml.safe_load(make_example(op))
    for parameter in op.parameters:
        value = parameter.default if parameter.default is not None else 0.5
        assert find_problems(example | {"parameters": {**example.get("parameters", {}), parameter.name: value}}) == []
        own = {
            **example["models"][0],
            "parameters": {**example["models"][0].get("parameters", {}), parameter.name: value},
        }
        models = [own, *example["models"][1:]]
        assert (find_problems(example | {"models": models}) == []) == parameter.per_model
    assert "wieght" in find_problems(example | {"parameters": {**example.get("parameters", {}), "wieght": 1}})[0]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"merge_method": "tise"}, "$.merge_method: "),
        ({"base_model": ["org/a"]}, "$.base_model: "),
        ({"dtype": "b16"}, "$.dtype: 'b16' is not one of"),
        ({"slices": SLERP["slices"]}, "$: "),
        ({"models": []}, "$.models: [] should be non-empty"),
        ({"models": ["org/a"]}, "$.models[0]: 'org/a' is not of type 'object'"),
        (
            {"models": [{"modle": "org/a"}]},
            "$.models[0]: Additional properties are not allowed ('modle' was unexpected)",
        ),
        ({"parameters": {"density": "half"}}, "$.parameters.density: "),
        ({"parameters": {"density": 1.5}}, "$.parameters.density: "),
        ({"parameters": {"density": [{"filter": "mlp"}]}}, "$.parameters.density: "),
        ({"parameters": {"normalize": "maybe"}}, "$.parameters.normalize: "),
        ({"parameters": {"weight": True}}, "$.parameters.weight: "),
        ({"parameters": {"t": 0.5}}, "$.parameters: Additional properties are not allowed ('t' was unexpected)"),
        ({"integers": "mean"}, "$.integers: 'mean' is not one of"),
        ({"merge_methods": "ties"}, "$: Additional properties are not allowed ('merge_methods' was unexpected)"),
    ],
)
def test_finds_what_is_wrong(change: dict[str, Any], problem: str) -> None:
    wrong = TIES | change
    with pytest.raises(ConfigError):
        load_config(wrong, strict=True)
    assert any(found.startswith(problem) for found in find_problems(wrong)), find_problems(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {key: value for key, value in TIES.items() if key != "base_model"},
        {"merge_method": "slerp", "base_model": "org/a", "models": [{"model": "org/b"}]},
        {"merge_method": "slerp", "base_model": "a", "models": [{"model": x} for x in "abc"], "parameters": {"t": 0.5}},
        {"merge_method": "linear"},
        {**SLERP, "slices": [{"sources": []}]},
    ],
    ids=["no base", "no t", "too many", "no models", "no sources"],
)
def test_finds_what_is_missing(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        load_config(wrong)
    assert find_problems(wrong)


@pytest.mark.parametrize("num_tries", [60, pytest.param(3000, marks=pytest.mark.slow)])
def test_takes_whatever_strict_takes(num_tries: int) -> None:
    """Mutated configs: the loader is the judge."""
    random = Random(1)
    seeds = [TIES, SLERP, MIXTURE, *(yaml.safe_load(make_example(op)) for op in OPS)]
    num_taken = 0
    for _ in range(num_tries):
        text = dump(mutate(parse_pairs(json.dumps(random.choice(seeds))), random, YAML_VALUES + VALUES + NUMBERS, 1))
        try:
            load_config(text, strict=True)
        except (ConfigError, ValueError):
            continue
        num_taken += 1
        assert find_problems(read_documents(text)[0].content) == [], text
    assert num_taken > num_tries / 20


def test_the_command_prints_it(cli: Cli, tmp_path: Path) -> None:
    assert json.loads(cli("schema").out) == json.loads(json.dumps(SCHEMA))
    own = tmp_path / "own.py"
    own.write_text(
        "from raymerge.ops.kernels.linear import LinearCombination\n"
        "from raymerge.ops.registry import Base, Share, merge_op\n"
        '@merge_op(title="Mine", base=Base.INPUT)\n'
        "def mine(share: Share):\n"
        '    """Mixes two models."""\n'
        "    return LinearCombination((1.0, share))\n"
    )
    schema = json.loads(cli("schema", "--ops", str(own)).out)
    config = {"merge_method": "mine", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"share": 0.5}}
    jsonschema.Draft202012Validator(schema).validate(config)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATOR.validate(config)
