"""Whole merges, compared with float64 arithmetic on whole tensors."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from raymerge import merge, plan
from raymerge.pipeline.errors import ConfigError, OutputError, TensorMismatchError
from raymerge.pipeline.stores.buffers import BufferPool
from tests.checkpoints import (
    Tensors,
    add_noise,
    llama_config,
    llama_tensors,
    read_tensors,
    write_checkpoint,
    write_config,
    write_family,
)
from tests.commands import Cli, run_command
from tests.references import find_exact

Reference = Callable[[Sequence[torch.Tensor]], torch.Tensor]

WEIGHTS, DENSITIES = (1.0, 0.5, -0.25), (0.5, 0.25, 0.75)
VOCAB, HIDDEN = 2200, 64
"""The embedding has more elements than a block, and no whole number of blocks."""


def weighted(models: Sequence[Path], weights: Sequence[float], **more: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {
            "model": str(model),
            "parameters": {"weight": weight, **{name: values[i] for name, values in more.items()}},
        }
        for i, (model, weight) in enumerate(zip(models, weights, strict=True))
    ]


def cases(family: Sequence[Path]) -> dict[str, tuple[dict[str, Any], Reference]]:
    """Return a config and its reference for each method; the family is a base and three fine-tunes."""
    base, tuned = str(family[0]), family[1:]
    return {
        "linear": (
            {"merge_method": "linear", "models": weighted(family, (1, 2, -0.5, 0.25))},
            lambda x: find_exact("linear", x, {"weight": (1, 2, -0.5, 0.25)}).values,
        ),
        "linear unnormalized": (
            {
                "merge_method": "linear",
                "models": weighted(family, (0.3, 0.3, 0.3, 0.2)),
                "parameters": {"normalize": False},
            },
            lambda x: find_exact("linear", x, {"weight": (0.3, 0.3, 0.3, 0.2), "normalize": False}).values,
        ),
        "slerp": (
            {
                "merge_method": "slerp",
                "base_model": base,
                "models": [{"model": str(model)} for model in family[:2]],
                "parameters": {"t": 0.3},
            },
            lambda x: find_exact("slerp", x[:2], {"t": 0.3}).values,
        ),
        "nuslerp": (
            {"merge_method": "nuslerp", "models": weighted(tuned[:2], (1, 3))},
            lambda x: find_exact("nuslerp", x[1:3], {"weight": (1, 3)}).values,
        ),
        "nuslerp by columns, from a base that is listed last": (
            {
                "merge_method": "nuslerp",
                "base_model": base,
                "models": [*weighted(tuned[1::-1], (1, 3)), {"model": base}],
                "parameters": {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            },
            lambda x: (
                find_exact(
                    "nuslerp",
                    [x[0], x[2], x[1]],
                    {"weight": (1, 3), "nuslerp_flatten": False, "nuslerp_row_wise": True},
                ).values
            ),
        ),
        "multislerp": (
            {"merge_method": "multislerp", "base_model": base, "models": weighted(tuned, (1, 0.5, 0.25))},
            lambda x: find_exact("multislerp", x, {"weight": (1, 0.5, 0.25)}).values,
        ),
        "karcher": (
            {"merge_method": "karcher", "models": [{"model": str(model)} for model in family]},
            lambda x: find_exact("karcher", x, {}).values,
        ),
        "task_arithmetic": (
            {
                "merge_method": "task_arithmetic",
                "base_model": base,
                "models": weighted(tuned, WEIGHTS),
                "parameters": {"lambda": 0.7},
            },
            lambda x: find_exact("task_arithmetic", x, {"weight": WEIGHTS, "lambda": 0.7}).values,
        ),
        "ties": (
            {
                "merge_method": "ties",
                "base_model": base,
                "models": weighted(tuned, (1, 0.5, 0.25), density=DENSITIES),
                "parameters": {"lambda": 0.7},
            },
            lambda x: find_exact("ties", x, {"weight": (1, 0.5, 0.25), "density": DENSITIES, "lambda": 0.7}).values,
        ),
        "ties unnormalized, one weight negative": (
            {
                "merge_method": "ties",
                "base_model": base,
                "models": weighted(tuned, WEIGHTS, density=DENSITIES),
                "parameters": {"normalize": False},
            },
            lambda x: find_exact("ties", x, {"weight": WEIGHTS, "density": DENSITIES, "normalize": False}).values,
        ),
        "dare_linear": (
            {"merge_method": "dare_linear", "base_model": base, "models": weighted(tuned, WEIGHTS)},
            lambda x: find_exact("dare_linear", x, {"weight": WEIGHTS}).values,
        ),
        "dare_ties": (
            {"merge_method": "dare_ties", "base_model": base, "models": weighted(tuned, WEIGHTS)},
            lambda x: find_exact("dare_ties", x, {"weight": WEIGHTS}).values,
        ),
        "passthrough": (
            {"merge_method": "passthrough", "models": [{"model": base, "parameters": {"scale": 1.7}}]},
            lambda x: find_exact("passthrough", x[:1], {"scale": (1.7,)}).values,
        ),
    }


def assert_close(found: torch.Tensor, expected: torch.Tensor, inputs: Sequence[torch.Tensor]) -> None:
    """Compare with what is exact: half a unit in the last place of the dtype, and one part in 10^6 of the inputs."""
    scale = torch.stack([x.double().abs() for x in inputs]).sum(0)
    half_ulp = torch.exp2(torch.floor(torch.log2(expected.abs().clamp(min=1e-300)))) * torch.finfo(found.dtype).eps / 2
    error = (found.double() - expected).abs()
    assert (error <= half_ulp + 1e-6 * scale).all()


@pytest.fixture(scope="module", params=[(torch.bfloat16, 3), (torch.float32, 2)], ids=str)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ...]:
    dtype, num_shards = request.param
    directory = tmp_path_factory.mktemp("family")
    return write_family(directory, 3, dtype=dtype, num_shards=num_shards, vocab=VOCAB, hidden=HIDDEN)


@pytest.mark.parametrize("name", cases([Path("a")] * 4))
def test_equals_reference(name: str, family: tuple[Path, ...], tmp_path: Path) -> None:
    config, reference = cases(family)[name]
    report = merge(config, tmp_path / "out", workers=2)
    inputs = [read_tensors(model) for model in family]
    merged = read_tensors(tmp_path / "out")
    assert merged.keys() == inputs[0].keys()
    assert report.num_tensors == len(merged)
    for tensor, found in merged.items():
        sources = [model[tensor] for model in inputs]
        assert (found.dtype, found.shape) == (sources[0].dtype, sources[0].shape)
        assert_close(found, reference(sources), sources)
        assert not torch.equal(found, sources[0])


def test_equals_reference_from_the_command_line(tmp_path: Path) -> None:
    family = write_family(tmp_path, 3, dtype=torch.bfloat16, num_shards=2)
    config, reference = cases(family)["slerp"]
    path = write_config(tmp_path / "merge.yml", config)
    outcome = run_command("merge", path, tmp_path / "out", "--workers", "2", "--memory", "64MiB")
    assert outcome.code == 0, outcome.err
    inputs = [read_tensors(model) for model in family]
    for tensor, found in read_tensors(tmp_path / "out").items():
        assert_close(found, reference([model[tensor] for model in inputs]), [model[tensor] for model in inputs])


def dare(family: Sequence[Path], out: Path, seed: int = 0) -> list[torch.Tensor]:
    """Return the merged embedding minus the base's, for each fine-tune alone and for all at once."""
    result = []
    for number, weights in enumerate([(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)]):
        config = {
            "merge_method": "dare_linear",
            "base_model": str(family[0]),
            "models": weighted(family[1:], weights),
            "parameters": {"density": 0.3},
            "out_dtype": "float32",
        }
        directory = out / f"{seed}-{number}"
        merge(config, directory, seed=seed)
        name = "model.embed_tokens.weight"
        result.append(read_tensors(directory)[name] - read_tensors(family[0])[name].float())
    return result


def test_dare_drops_at_random_and_rescales(tmp_path: Path) -> None:
    family = write_family(tmp_path / "in", 2, dtype=torch.bfloat16, vocab=VOCAB, hidden=HIDDEN)
    first, second, both = dare(family, tmp_path / "out")
    name = "model.embed_tokens.weight"
    base, *tuned = (read_tensors(model)[name].float() for model in family)
    n = base.numel()
    for thinned, full in zip((first, second), tuned, strict=True):
        delta = (full - base).double()
        kept = thinned != 0
        # A share of 0.3 is kept, five standard deviations either way; and of every block of elements likewise.
        assert abs(kept.double().mean() - 0.3) < 5 * (0.3 * 0.7 / n) ** 0.5
        for part in kept.reshape(-1)[: n // 10_000 * 10_000].reshape(-1, 10_000):
            assert abs(part.double().mean() - 0.3) < 5 * (0.3 * 0.7 / 10_000) ** 0.5
        factor = float(delta.abs().sum() / delta[kept].abs().sum())
        torch.testing.assert_close(thinned[kept].double(), delta[kept] * factor, rtol=1e-4, atol=1e-6)
    # Two models have masks of their own: both keep an element with a probability of 0.09.
    assert abs(((first != 0) & (second != 0)).double().mean() - 0.09) < 5 * (0.09 * 0.91 / n) ** 0.5
    torch.testing.assert_close(both, first + second, rtol=1e-4, atol=1e-6)
    other_seed = dare(family, tmp_path / "out", seed=1)[0]
    assert abs(((first != 0) & (other_seed != 0)).double().mean() - 0.09) < 5 * (0.09 * 0.91 / n) ** 0.5


def test_dtypes_of_the_output(tmp_path: Path) -> None:
    family = write_family(tmp_path, 1, dtype=torch.float32)
    models = [{"model": str(model), "parameters": {"weight": 1}} for model in family]
    for keys, expected in [
        ({}, "float32"),
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"dtype": "float32", "out_dtype": "float16"}, "float16"),
        ({"out_dtype": "torch.float64"}, "float64"),
    ]:
        out = tmp_path / f"out-{expected}"
        merge({"merge_method": "linear", "models": models, **keys}, out)
        assert {str(x.dtype) for x in read_tensors(out).values()} == {f"torch.{expected}"}
        assert json.loads((out / "config.json").read_text())["torch_dtype"] == expected


def test_mixed_dtypes_of_the_inputs_are_promoted(tmp_path: Path) -> None:
    one, two = llama_tensors(1), {name: x.bfloat16() for name, x in llama_tensors(2).items()}
    models = [
        write_checkpoint(tmp_path / "one", one, llama_config()),
        write_checkpoint(tmp_path / "two", two, llama_config(torch_dtype="bfloat16")),
    ]
    merge({"merge_method": "linear", "models": weighted(models, (1, 1))}, tmp_path / "out")
    for name, found in read_tensors(tmp_path / "out").items():
        assert found.dtype == torch.float32
        exact = find_exact("linear", [one[name], two[name]], {"weight": (1, 1)}).values
        assert_close(found, exact, [one[name], two[name]])


def test_overflow_is_reported(tmp_path: Path, cli: Cli) -> None:
    tensors = llama_tensors(0, dtype=torch.bfloat16)
    tensors["model.norm.weight"][3] = 70_000.0  # fits bfloat16, not float16
    tensors["lm_head.weight"][0, 0] = torch.nan
    model = write_checkpoint(tmp_path / "in", tensors, llama_config())
    config = {"merge_method": "linear", "models": weighted([model], [1]), "dtype": "float16"}
    report = merge(config, tmp_path / "out")
    assert report.nonfinite == ("lm_head.weight", "model.norm.weight")
    assert merge(config, tmp_path / "out").nonfinite == report.nonfinite
    path = write_config(tmp_path / "merge.yml", config)
    for _ in range(2):  # made, and complete already
        outcome = cli("merge", path, tmp_path / "cli", "-q")
        assert (outcome.code, outcome.out) == (0, "")
        assert outcome.err.splitlines() == [
            f"warning: {name}: the output has NaN or infinite values" for name in report.nonfinite
        ]
    outcome = cli("merge", path, tmp_path / "cli", "--strict")
    assert outcome.code == 2
    assert "NaN or infinite values in lm_head.weight, model.norm.weight" in outcome.err


def test_strict_refuses_overflow_before_anything_can_be_loaded(tmp_path: Path) -> None:
    tensors = llama_tensors(0)
    tensors["model.norm.weight"][3] = torch.inf
    model = write_checkpoint(tmp_path / "in", tensors, llama_config())
    config = {"merge_method": "linear", "models": weighted([model], [1])}
    with pytest.raises(OutputError, match=r"infinite values in model\.norm\.weight, refused because of strict"):
        merge(config, tmp_path / "out", shard_size=1, strict=True)
    assert not (tmp_path / "out" / "config.json").exists()
    report = merge(config, tmp_path / "out", shard_size=1)
    assert report.num_resumed == report.num_shards
    assert report.nonfinite == ("model.norm.weight",)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("workers", 0),
        ("workers", -1),
        ("memory", 0),
        ("memory", "0B"),
        ("shard_size", 0),
        ("shard_size", -5),
        ("seed", -1),
    ],
)
def test_arguments_are_checked_first(argument: str, value: Any, tmp_path: Path) -> None:
    for function in (plan, partial(merge, out=tmp_path / "out")):
        with pytest.raises(ConfigError, match=str(value)):
            function("no config at all", **{argument: value})
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files as Linux lists them")
def test_nothing_is_held_after_a_merge(tmp_path: Path) -> None:
    """A process that merges a hundred times holds no buffers of a hundred sizes, and no files open."""
    models = weighted(write_family(tmp_path / "in", 1), (1, 1))
    files = set(Path("/proc/self/fd").iterdir())
    for size in range(3):
        plan({"merge_method": "linear", "models": models})
        assert len(set(Path("/proc/self/fd").iterdir()) - files) <= 1  # the directory that is being listed
        merge({"merge_method": "linear", "models": models}, tmp_path / f"{size}", memory=2**24 + size * 2**20)
        pools = [found for found in gc.get_objects() if type(found) is BufferPool]
        assert not any(any(pool._free.values()) for pool in pools)
        assert len(set(Path("/proc/self/fd").iterdir()) - files) <= 1


def with_buffers(tensors: Tensors, **buffers: torch.Tensor) -> Tensors:
    return tensors | buffers


def test_integer_buffers_are_copied(tmp_path: Path) -> None:
    ids = torch.arange(40).reshape(1, 40)
    flags = torch.tensor([True, False, True])
    base = with_buffers(llama_tensors(0), position_ids=ids, flags=flags)
    tuned = with_buffers(add_noise(llama_tensors(0), 1), position_ids=ids, flags=flags)
    models = [write_checkpoint(tmp_path / f"m{k}", x, llama_config()) for k, x in enumerate((base, tuned))]
    merge({"merge_method": "linear", "models": weighted(models, (1, 1)), "dtype": "bfloat16"}, tmp_path / "out")
    merged = read_tensors(tmp_path / "out")
    assert torch.equal(merged["position_ids"], ids)
    assert torch.equal(merged["flags"], flags)
    assert merged["model.norm.weight"].dtype == torch.bfloat16


def test_integer_buffers_that_differ_are_refused(tmp_path: Path) -> None:
    """Here while they are copied: they are too large to be compared before."""
    models = [
        write_checkpoint(
            tmp_path / f"m{k}", with_buffers(llama_tensors(0), position_ids=torch.arange(10_000) + k), llama_config()
        )
        for k in range(2)
    ]
    config = {"merge_method": "linear", "models": weighted(models, (1, 1))}
    with pytest.raises(TensorMismatchError, match=r"position_ids .*I64.* differs between .*m0 and .*m1"):
        merge(config, tmp_path / "out")
    assert not (tmp_path / "out" / "config.json").exists()


def test_empty_tensors_and_scalars(tmp_path: Path) -> None:
    models = [
        write_checkpoint(
            tmp_path / f"m{k}",
            with_buffers(llama_tensors(k), scale=torch.tensor(1.0 + k), nothing=torch.zeros(0, 4)),
            llama_config(),
        )
        for k in range(2)
    ]
    cases: list[tuple[str, dict[str, Any]]] = [
        ("linear", {"parameters": {"weight": 1}}),
        ("slerp", {"base_model": str(models[0]), "parameters": {"t": 0.5}}),
        ("ties", {"base_model": str(models[0]), "parameters": {"weight": 0.5, "density": 0.5, "normalize": False}}),
        ("dare_ties", {"base_model": str(models[0]), "parameters": {"weight": 0.5}}),
    ]
    for method, more in cases:
        out = tmp_path / method
        merge({"merge_method": method, "models": [{"model": str(model)} for model in models], **more}, out)
        merged = read_tensors(out)
        assert merged["nothing"].shape == (0, 4)
        assert merged["scale"].shape == ()
        assert float(merged["scale"]) == 1.5
