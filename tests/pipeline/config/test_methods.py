"""How many models a method takes."""

from __future__ import annotations

from typing import Any

import pytest

from raymerge.ops.registry import find_op
from raymerge.pipeline.config.reader import load_config
from raymerge.pipeline.errors import ConfigError


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
