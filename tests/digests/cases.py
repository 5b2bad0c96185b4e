"""The merges whose output is held, byte for byte."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SHIPPED = sorted((Path(__file__).parents[2] / "configs").glob("*.yml"))


@dataclass(frozen=True)
class Case:
    """One merge of models of `tests.digests.models`."""

    config: dict[str, Any] | Path
    options: dict[str, Any] = field(default_factory=dict)
    is_streamed: bool = False
    """Whether the memory is so small that tensors are read several times."""


def listed(**models: dict[str, Any] | float | None) -> list[dict[str, Any]]:
    """Return entries of `models`: each with its parameters, or its weight; `_` stands for `-` in names."""
    entries: list[dict[str, Any]] = []
    for name, given in models.items():
        parameters = given if isinstance(given, dict) or given is None else {"weight": given}
        entries.append({"model": name.replace("_", "-")} | ({"parameters": parameters} if parameters else {}))
    return entries


def merged(method: str, models: list[dict[str, Any]], base: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a config in `models` form; keywords that no config has at its top are parameters."""
    return {"merge_method": method, "models": models, **_top(base, more)}


def sliced(method: str, *slices: dict[str, Any], base: str | None = None, **more: Any) -> dict[str, Any]:
    """Return a config in `slices` form."""
    return {"merge_method": method, "slices": list(slices), **_top(base, more)}


def layers(start: int, stop: int, *names: str, own: tuple[Any, ...] = (), **more: Any) -> dict[str, Any]:
    """Return one slice: the same layers of some models, with parameters of their own."""
    sources: list[dict[str, Any]] = [{"model": name, "layer_range": [start, stop]} for name in names]
    for source, parameters in zip(sources, own, strict=False):
        source["parameters"] = parameters
    return {"sources": sources} | more


def _top(base: str | None, more: dict[str, Any]) -> dict[str, Any]:
    top = {key: more.pop(key) for key in ("dtype", "out_dtype") if key in more}
    parameters = {key.rstrip("_"): value for key, value in more.items()}
    return ({"base_model": base} if base else {}) | top | ({"parameters": parameters} if parameters else {})


FOUR = listed(base=1, base_1=2, base_2=-0.5, base_3=0.25)
SIGNS = listed(base_1=1.0, base_2=0.5, base_3=-0.25)
TRIMMED = listed(
    base_1={"weight": 1, "density": 0.5},
    base_2={"weight": 0.5, "density": 0.25},
    base_3={"weight": 0.25, "density": 0.75},
)
BIG = listed(big_1={"weight": 0.7, "density": 0.4}, big_2={"weight": 0.4, "density": 0.7})
RISING = [0.1, 0.4, 0.9]
BY_NAME = [
    {"filter": "self_attn", "value": [0, 0.5, 0.3, 0.7, 1]},
    {"filter": "regex:layers\\.[0-1]\\.", "value": 0.2},
    {"filter": "glob:*norm*", "value": 0.9},
    {"value": 0.5},
]
PAIR = listed(base=None, base_1=None)
SMALL_FILES = {"shard_size": "4kB", "workers": 3}
FEW_BLOCKS = {"memory": "16MiB"}
FOR_THREE = {"memory": "23MiB"}

LINEAR = {
    "linear": Case(merged("linear", FOUR)),
    "linear, not normalized": Case(merged("linear", listed(base=0.3, base_1=0.3, base_2=0.2), normalize=False)),
    "linear, one model": Case(merged("linear", listed(base_1=3))),
    "linear, a weight of zero": Case(merged("linear", listed(base=0, base_1=1, base_2=1))),
    "linear, gradients and filters": Case(
        merged("linear", listed(base={"weight": BY_NAME}, base_1={"weight": RISING}))
    ),
    "linear, base not listed": Case(merged("linear", listed(base_1=1, base_2=0.5), "base", weight=0.25)),
    "linear, float32": Case(merged("linear", listed(f32=1, f32_1=2, f32_2=-0.5))),
    "linear, float16": Case(merged("linear", listed(f16=1, f16_1=2))),
    "linear, float64": Case(merged("linear", listed(f64=1, f64_1=2))),
    "linear, dtypes that differ within a model": Case(merged("linear", listed(mixed=1, mixed_1=2))),
    "linear, dtypes that differ between models": Case(merged("linear", listed(base=1, f16=1, f32=1))),
    "linear, bfloat16 and float64": Case(merged("linear", listed(base=1, f64=1))),
    "linear, dtype": Case(merged("linear", FOUR, dtype="float32")),
    "linear, out_dtype": Case(merged("linear", FOUR, dtype="float32", out_dtype="float16")),
    "linear, out_dtype float64": Case(merged("linear", FOUR, out_dtype="float64")),
    "linear, out_dtype bfloat16": Case(merged("linear", listed(f32=1, f32_1=2), out_dtype="bfloat16")),
    "linear, small files": Case(merged("linear", FOUR), SMALL_FILES),
    "linear, odd tensors": Case(merged("linear", listed(odd=1, odd_1=0.5))),
    "linear, odd tensors in small files": Case(merged("linear", listed(odd=1, odd_1=0.5)), {"shard_size": "3kB"}),
    "linear, padded vocabulary": Case(merged("linear", listed(padded=1, padded_1=1))),
    "linear, experts": Case(merged("linear", listed(moe=1, moe_1=RISING[1]))),
    "linear, prediction layer": Case(merged("linear", listed(mtp=1, mtp_1={"weight": RISING}))),
    "linear, masks and a tied GPT-2": Case(merged("linear", listed(gpt2=1, gpt2_1=1))),
    "linear, one layer on a gradient": Case(merged("linear", listed(one={"weight": RISING}, one_1=0.5))),
    "linear, another rope_theta": Case(merged("linear", listed(base=1, theta=1))),
    "linear, tied": Case(merged("linear", listed(tied=1, tied_1=2))),
    "linear, tied with a stored head": Case(merged("linear", listed(tied_stored=1, tied_1=1))),
    "linear, tied and untied": Case(merged("linear", listed(tied=1, untied=2, tied_stored=0.5))),
    "linear, untied and tied": Case(merged("linear", listed(untied=1, tied=2))),
    "linear, silent about tying": Case(merged("linear", listed(silent=1, tied=2))),
    "linear, several blocks": Case(merged("linear", listed(big=1, big_1=0.3, big_2=0.4)), FEW_BLOCKS),
}

SLERP = {
    "slerp": Case(merged("slerp", PAIR, "base", t=0.3)),
    "slerp, base last": Case(merged("slerp", PAIR[::-1], "base", t=0.3)),
    "slerp, the ends": Case(merged("slerp", PAIR, "base", t=[0, 1])),
    "slerp, past the ends": Case(merged("slerp", PAIR, "base", t=[-0.25, 1.25])),
    "slerp, wide angles": Case(merged("slerp", listed(base=None, kinds=None), "base", t=0.4)),
    "slerp, gradients and filters": Case(merged("slerp", PAIR, "base", t=BY_NAME, dtype="float32"), SMALL_FILES),
    "slerp, float32": Case(merged("slerp", listed(f32=None, f32_1=None), "f32", t=0.4)),
    "slerp, tied and untied": Case(merged("slerp", listed(tied=None, untied=None), "tied", t=0.6)),
    "slerp, odd tensors": Case(merged("slerp", listed(odd=None, odd_1=None), "odd", t=0.6)),
    "slerp, streamed": Case(merged("slerp", listed(big=None, big_2=None), "big", t=0.6), FEW_BLOCKS, True),
}

DELTAS = {
    "task_arithmetic": Case(merged("task_arithmetic", SIGNS, "base", lambda_=0.7)),
    "task_arithmetic, normalized": Case(merged("task_arithmetic", SIGNS, "base", normalize=True, int8_mask=True)),
    "task_arithmetic, the base alone": Case(merged("task_arithmetic", listed(base=None), "base", weight=1)),
    "task_arithmetic, lambda on a gradient": Case(merged("task_arithmetic", SIGNS, "base", lambda_=RISING)),
    "task_arithmetic, tied": Case(merged("task_arithmetic", listed(tied_1=1, tied_2=-1), "tied")),
    "ties": Case(merged("ties", TRIMMED, "base", lambda_=0.7)),
    "ties, signs, not normalized": Case(merged("ties", SIGNS, "base", density=0.4, normalize=False)),
    "ties, rescaled": Case(merged("ties", TRIMMED, "base", rescale=True, int8_mask=True)),
    "ties, all or nothing": Case(
        merged("ties", listed(base_1={"density": 1}, base_2={"density": 0}, base_3={"density": 0.01}), "base", weight=1)
    ),
    "ties, gradients and filters": Case(
        merged("ties", listed(base=None, base_1=1, base_2={"weight": RISING}), "base", density=BY_NAME), SMALL_FILES
    ),
    "ties, float32": Case(merged("ties", listed(f32_1=1, f32_2=0.5), "f32", density=0.3, out_dtype="bfloat16")),
    "ties, odd tensors": Case(merged("ties", listed(odd_1=1), "odd", density=0.3)),
    "ties, streamed": Case(merged("ties", BIG, "big"), FOR_THREE, True),
    "ties, rescaled and streamed by two": Case(
        merged("ties", BIG, "big", rescale=True), {"memory": "46MiB", "workers": 2, "shard_size": "200kB"}, True
    ),
    "dare_linear": Case(merged("dare_linear", TRIMMED, "base", lambda_=1.2)),
    "dare_linear, another seed": Case(merged("dare_linear", TRIMMED, "base", lambda_=1.2), {"seed": 7}),
    "dare_linear, normalized, not rescaled": Case(
        merged("dare_linear", SIGNS, "base", density=RISING, normalize=True, rescale=False)
    ),
    "dare_ties": Case(merged("dare_ties", TRIMMED, "base", int8_mask=True), {"seed": 3, **SMALL_FILES}),
    "dare_ties, normalized, not rescaled": Case(
        merged("dare_ties", TRIMMED, "base", normalize=True, rescale=False), {"seed": 3}
    ),
    "dare_ties, tied and untied": Case(merged("dare_ties", listed(untied=1, tied_1=0.5), "tied", density=0.6)),
    "dare_ties, streamed": Case(merged("dare_ties", BIG, "big"), FEW_BLOCKS | {"seed": 11}, True),
}

SLICES = {
    "passthrough": Case(merged("passthrough", listed(base_1={"scale": 1.7}))),
    "passthrough, scaled by name": Case(merged("passthrough", listed(base_1={"scale": BY_NAME}))),
    "passthrough, a stack": Case(sliced("passthrough", layers(0, 3, "base"), layers(1, 4, "base-1"), dtype="bfloat16")),
    "passthrough, repeated layers": Case(
        sliced("passthrough", *(layers(k, k + 1, "base") for k in (0, 1, 1, 2, 1, 3))), SMALL_FILES
    ),
    "passthrough, scaled slices": Case(
        sliced("passthrough", layers(0, 2, "base"), layers(0, 4, "deep", own=({"scale": [1, 0]},)), scale=2)
    ),
    "passthrough, a tied stack": Case(sliced("passthrough", layers(0, 2, "tied"), layers(1, 4, "tied"))),
    "passthrough, tied and untied": Case(sliced("passthrough", layers(0, 2, "tied"), layers(1, 4, "untied"))),
    "passthrough, kinds of layers": Case(sliced("passthrough", layers(1, 4, "kinds"), layers(0, 2, "kinds-1"))),
    "passthrough, prediction layer": Case(sliced("passthrough", layers(0, 3, "mtp"), layers(2, 4, "mtp-1"))),
    "linear slices": Case(
        sliced("linear", layers(0, 2, "base", "base-1", own=({"weight": 0.2},)), layers(2, 4, "base-2"), weight=1)
    ),
    "linear slices, more models last": Case(
        sliced("linear", layers(0, 1, "base"), layers(0, 4, "base", "base-1", own=({"weight": RISING}, {"weight": 1})),
               weight=1)
    ),
    "linear slices, experts": Case(sliced("linear", layers(0, 2, "moe", "moe-1"), layers(1, 2, "moe-1"), weight=1)),
    "slerp slices": Case(
        sliced("slerp", layers(0, 2, "base", "base-1"), layers(1, 4, "base", "base-1", parameters={"t": 0.9}),
               base="base", t=BY_NAME)
    ),
    "ties slices of different bases": Case(
        sliced("ties",
               layers(0, 2, "base", "base-1", "base-2", own=({}, {"density": 0.3}), parameters={"lambda": 0.5}),
               layers(2, 4, "base-3", "base-1", base_model="base-3"), base="base", weight=RISING, density=0.8)
    ),
    "dare_ties slices, repeated": Case(
        sliced("dare_ties", layers(0, 4, "base", "base-1"), layers(0, 4, "base", "base-1"),
               base="base", weight=0.8, density=0.5),
        {"seed": 5},
    ),
}  # fmt: skip

MERGES = LINEAR | SLERP | DELTAS | SLICES | {f"configs/{path.name}": Case(path) for path in SHIPPED}
"""From local disk to local disk."""

REMOTE = ("base", "base-1", "base-2")
"""Models that lie in stores as well."""


def remote(prefix: str, **more: Any) -> dict[str, Any]:
    """Return a merge of the models at a place."""
    models = [{"model": f"{prefix}{name}", "parameters": {"weight": 0.5}} for name in REMOTE[1:]]
    return merged("ties", models, f"{prefix}{REMOTE[0]}", density=0.6, **more)


FILES = {"shard_size": "8kB"}
S3_MERGES = {
    "S3 to S3": (Case(remote("s3://digests/"), FILES), "s3://digests/merged"),
    "S3 to S3 through fsspec": (Case(remote("s3://digests/"), FILES | {"storage": "fsspec"}), "s3://digests/by-fsspec"),
    "S3 to disk, one worker": (Case(remote("s3://digests/", dtype="float32"), {"workers": 1}), "merged"),
    "disk to S3": (Case(remote(""), FILES | {"workers": 3}), "s3://digests/from-disk"),
}
"""From and to an S3 server; with the output's URL."""
HUB_MERGES = {
    "Hub to Hub": (Case(remote("org/"), FILES), "hf://me/merged"),
    "Hub to disk": (Case(remote("org/"), FILES), "merged"),
}
"""From and to a Hub."""
RAY_MERGES = {
    "Ray": (Case(remote(""), FILES | {"ray": True, "workers": 2}), "merged"),
    "Ray, slices": (Case(SLICES["dare_ties slices, repeated"].config, FILES | {"ray": True, "seed": 5}), "merged"),
}
"""On a Ray of this machine."""
