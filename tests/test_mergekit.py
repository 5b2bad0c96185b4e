"""Every deterministic method with all its switches, against mergekit 0.1.5 in a process and an environment of its own.

`make test-mergekit` installs it and runs this.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from raymerge import merge
from raymerge.ops.registry import load_ops
from tests.checkpoints import read_tensors, write_checkpoint

PEER = Path(os.environ.get("RAYMERGE_MERGEKIT", ".venv-mergekit/bin/mergekit-multi"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not PEER.exists(), reason=f"{PEER} is not there")]

SIZES: dict[str, Any] = {
    "vocab_size": 120,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, Any] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES, tie_word_embeddings=True)),
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=2)),
}

ROUNDING = 2.0**-21
"""Element-wise methods: a unit in the last place of the largest input for each of three terms and their sum."""
SUMS = 1e-6
"""Methods that add something up over a tensor."""

METHODS = {
    "arcee_fusion",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "karcher",
    "linear",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "passthrough",
    "ram",
    "ramplus_tl",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
}
WEIGHTS = {"weight": (1.0, 0.5, 0.25)}
UNEQUAL = {"weight": (0.7, -0.3, 0.4)}
DENSITIES = {"density": (0.5, 0.3, 0.8)}

Case = tuple[str, int, dict[str, Any], float]
"""Method, number of fine-tunes, parameters (a tuple has one value for each model), bound."""
CASES: Sequence[Case] = (
    ("linear", 3, WEIGHTS, ROUNDING),
    ("linear", 3, {**UNEQUAL, "normalize": False}, ROUNDING),
    ("slerp", 1, {"t": 0.3}, SUMS),
    ("slerp", 1, {"t": [0, 0.5, 1]}, SUMS),
    ("task_arithmetic", 3, WEIGHTS, ROUNDING),
    ("task_arithmetic", 3, {**UNEQUAL, "lambda": 0.7, "normalize": True}, ROUNDING),
    ("ties", 3, {**WEIGHTS, **DENSITIES}, ROUNDING),
    ("ties", 3, {**UNEQUAL, **DENSITIES, "normalize": False, "lambda": 1.3}, ROUNDING),
    ("ties", 3, {**WEIGHTS, **DENSITIES, "rescale": True}, SUMS),
    ("ties", 2, {"weight": 0.5, "density": 1.0, "int8_mask": True}, ROUNDING),
    ("dare_ties", 3, WEIGHTS, ROUNDING),
    ("dare_linear", 3, {**WEIGHTS, "normalize": True}, ROUNDING),
    ("passthrough", 1, {"scale": 0.5}, ROUNDING),
    ("nuslerp", 2, {"weight": (1.0, 3.0)}, SUMS),
    ("nuslerp", 2, {"weight": (1.0, 3.0), "nuslerp_flatten": False}, SUMS),
    ("nuslerp", 2, {"weight": (1.0, 3.0), "nuslerp_flatten": False, "nuslerp_row_wise": True}, SUMS),
    ("multislerp", 3, {"weight": (1.0, 1.0, 2.0)}, SUMS),
    ("multislerp", 3, {"weight": (1.0, 1.0, 2.0), "normalize_weights": False}, 4 * SUMS),
    ("karcher", 3, {}, SUMS),
    ("karcher", 3, {"max_iter": 3, "tol": 1e-3}, SUMS),
    ("model_stock", 3, {}, SUMS),
    ("model_stock", 3, {"filter_wise": True}, SUMS),
    ("arcee_fusion", 1, {}, ROUNDING),
    ("nearswap", 1, {"t": 0.01}, ROUNDING),
    ("ram", 3, {}, ROUNDING),
    ("ram", 3, {"epsilon": 0.005}, ROUNDING),
    ("ramplus_tl", 3, {"epsilon": 0.005, "r": 0.2, "alpha": 0.5}, SUMS),
    ("sce", 3, {}, SUMS),
    ("sce", 3, {"select_topk": 0.4, "int8_mask": True}, SUMS),
    ("breadcrumbs", 3, {**WEIGHTS, **DENSITIES, "gamma": 0.05}, ROUNDING),
    ("breadcrumbs", 3, {**UNEQUAL, **DENSITIES, "gamma": 0.05, "rescale": True, "normalize": True}, SUMS),
    ("breadcrumbs_ties", 3, {**WEIGHTS, **DENSITIES, "gamma": 0.05, "lambda": 0.8}, ROUNDING),
    ("della", 3, WEIGHTS, ROUNDING),
    ("della_linear", 3, {**UNEQUAL, "normalize": True}, ROUNDING),
)  # fmt: skip
BASELESS = {"linear", "passthrough", "karcher", "nuslerp", "multislerp"}
WITH_OPTIONAL_BASE: Sequence[Case] = (
    ("nuslerp", 2, {"weight": (1.0, 1.0)}, SUMS),
    ("multislerp", 3, {"weight": (1.0, 1.0, 2.0)}, SUMS),
)


def make_config(case: Case, directory: Path, *, has_base: bool) -> dict[str, Any]:
    method, num_models, parameters, _ = case
    models = []
    for k in range(num_models):
        own = {name: value[k] for name, value in parameters.items() if isinstance(value, tuple)}
        models.append({"model": str(directory / f"tune{k}"), "parameters": own})
    shared = {name: value for name, value in parameters.items() if not isinstance(value, tuple)}
    base = {"base_model": str(directory / "base")} if has_base else {}
    return {"merge_method": method, **base, "models": models, "parameters": shared, "dtype": "float32"}


def list_configs(directory: Path) -> Iterator[tuple[dict[str, Any], float]]:
    for case in CASES:
        yield make_config(case, directory, has_base=case[0] not in BASELESS), case[-1]
    for case in WITH_OPTIONAL_BASE:
        yield make_config(case, directory, has_base=True), case[-1]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, three fine-tunes of it, and what mergekit makes of them: a directory for each config, by its number."""
    directory = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    base: PreTrainedModel = ARCHITECTURES[request.param]()
    config = {**base.config.to_dict(), "architectures": [type(base).__name__]}
    tensors = base.state_dict()  # experts in one tensor, as mergekit wants them
    if base.config.tie_word_embeddings:
        del tensors["lm_head.weight"]
    write_checkpoint(directory / "base", tensors, config)
    for k in range(3):
        tuned = {name: x + 0.02 * (k + 1) * torch.randn_like(x) for name, x in tensors.items()}
        write_checkpoint(directory / f"tune{k}", tuned, config)
    documents = [{"name": f"merged{k}", **recipe} for k, (recipe, _) in enumerate(list_configs(directory))]
    file = directory / "recipe.yml"
    file.write_text("\n---\n".join(map(json.dumps, documents)))
    done = subprocess.run(
        [PEER, file, "--intermediate-dir", directory, "--quiet"], capture_output=True, text=True, timeout=1200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return directory


@pytest.mark.parametrize("number", range(len(CASES) + len(WITH_OPTIONAL_BASE)))
def test_same_numbers(number: int, family: Path, tmp_path: Path) -> None:
    config, bound = [*list_configs(family)][number]
    merge(config, str(tmp_path / "out"), workers=1)
    ours, theirs = read_tensors(tmp_path / "out"), read_tensors(family / f"merged{number}")
    assert ours.keys() == theirs.keys()
    sources = [read_tensors(family / name) for name in ("base", "tune0", "tune1", "tune2")]
    if config["merge_method"] == "arcee_fusion":  # takes the one or the other, by a threshold among rounded numbers
        num_other = {name: (ours[name] != expected).sum().item() for name, expected in theirs.items()}
        assert sum(num_other.values()) <= 0.005 * sum(x.numel() for x in theirs.values()), num_other
        return
    worst = {}
    for name, expected in theirs.items():
        if "nuslerp_row_wise" in config["parameters"] and len(expected) == 2:
            continue  # vectors of two numbers, one for each expert: many are all but opposite
        largest = torch.stack([source[name] for source in sources]).abs().amax(0).maximum(expected.abs())
        worst[name] = ((ours[name] - expected).abs() / largest).max().item()
    different = {name: f"{error:.2g}" for name, error in worst.items() if not error <= bound}
    assert not different, f"{json.dumps(config['parameters'])}: {different}"


def test_every_method_of_mergekit_is_there() -> None:
    assert {case[0] for case in CASES} == METHODS
    assert load_ops().keys() >= METHODS


def test_documents_that_use_each_other(family: Path, tmp_path: Path) -> None:
    base, *tunes = (str(family / name) for name in ("base", "tune0", "tune1", "tune2"))
    weighted = [{"model": tune, "parameters": {"weight": k + 1.0, "density": 0.5}} for k, tune in enumerate(tunes)]
    documents: list[dict[str, Any]] = [
        {"name": "first", "merge_method": "ties", "base_model": base, "models": weighted},
        {"name": "second", "merge_method": "nuslerp", "models": [{"model": "first"}, {"model": tunes[0]}]},
        {"merge_method": "slerp", "base_model": "second", "models": [{"model": tunes[2]}], "parameters": {"t": 0.3}},
    ]
    documents[1]["parameters"] = {"weight": 1.0}
    text = "\n---\n".join(json.dumps({**document, "dtype": "float32"}) for document in documents)
    file = tmp_path / "merge.yml"
    file.write_text(text)
    paths = ["--intermediate-dir", str(tmp_path), "--out-path", str(tmp_path / "theirs")]
    command = [str(PEER), str(file), *paths, "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    merge(file, tmp_path / "ours", workers=1)
    ours, theirs = read_tensors(tmp_path / "ours"), read_tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        assert torch.allclose(ours[name], expected, rtol=4 * SUMS, atol=4 * SUMS * float(expected.abs().max())), name
