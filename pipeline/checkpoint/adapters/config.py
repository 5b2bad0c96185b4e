"""adapter_config.json: what an adapter's factors are multiplied with, and what cannot be applied to stored weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from raymerge.pipeline.errors import CheckpointError
from raymerge.pipeline.messages import shown

_CHANGE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva_base")
"""Initialisations that change the model's own weights as well: the adapter goes with a base that no file holds."""

_REFUSED = {
    "alora_invocation_tokens": "an activated LoRA holds for some tokens only, so that no weights have its effect",
    "layer_replication": "it repeats layers of its base; stack them by `slices` first, and apply the adapter to that",
    "trainable_token_indices": "single trained tokens are not supported; apply them by peft (model.merge_and_unload())",
    "use_qalora": "QALoRA's factors belong to groups of columns; apply them by peft (model.merge_and_unload())",
    "use_bdlora": "block-diagonal factors are not supported; apply them by peft (model.merge_and_unload())",
    "kasa_config": "KaSA's factors are not supported; apply them by peft (model.merge_and_unload())",
    "monteclora_config": "MonteCLoRA's factors are not supported; apply them by peft (model.merge_and_unload())",
    "arrow_config": "Arrow chooses among adapters for each token, so that no weights have its effect",
}
_MAX_RANK = 2**16


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The part of adapter_config.json that decides what an adapter adds."""

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    """By a regular expression for the end of a module's name."""
    alpha_pattern: Mapping[str, float]
    use_rslora: bool
    use_dora: bool
    is_transposed: bool
    """Whether modules store their weights as inputs x outputs (`fan_in_fan_out`)."""
    target_parameters: tuple[str, ...]
    """Parameters, and no modules, that it changes, such as those of fused experts."""
    base: str
    """The model that it was trained on, as its author called it; empty where that is not said."""
    task: str | None = None
    """The kind of model, as peft calls it."""

    def scale(self, rank: int, alpha: float) -> float:
        """Return what the product of the factors is multiplied with."""
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def parse_adapter_config(content: Mapping[str, Any], url: str) -> AdapterConfig:
    """Check an adapter's config.

    Args:
        content: of adapter_config.json.
        url: of that file, for messages.

    Raises:
        CheckpointError: it is malformed, or its adapter is none that can be applied to stored weights.
    """
    fields = _Fields(content, url)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise fields.error("peft_type", "only LORA can be applied while merging; apply it by peft, and save the model")
    for name, why in _REFUSED.items():
        if content.get(name):
            raise fields.error(name, why)
    how = content.get("init_lora_weights")
    if isinstance(how, str) and how.startswith(_CHANGE_BASE):
        raise fields.error(
            "init_lora_weights",
            "this initialisation changes the base's own weights, which the adapter's files do not hold; save the"
            " adapter again in terms of the unchanged base (peft: path_initial_model_for_weight_conversion)",
        )
    parameters = content.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        raise fields.error("target_parameters", "a list of names is needed")
    base = content.get("base_model_name_or_path")
    return AdapterConfig(
        rank=fields.rank("r", content.get("r", 8)),
        alpha=fields.number("lora_alpha", content.get("lora_alpha", 8)),
        rank_pattern={key: fields.rank("rank_pattern", value) for key, value in fields.mapping("rank_pattern").items()},
        alpha_pattern={
            key: fields.number("alpha_pattern", value) for key, value in fields.mapping("alpha_pattern").items()
        },
        use_rslora=fields.flag("use_rslora"),
        use_dora=fields.flag("use_dora"),
        is_transposed=fields.flag("fan_in_fan_out"),
        target_parameters=tuple(parameters),
        base=base if isinstance(base, str) else "",
        task=task if isinstance(task := content.get("task_type"), str) else None,
    )


@dataclass(frozen=True, slots=True)
class _Fields:
    """Untrusted fields, as what they have to be."""

    content: Mapping[str, Any]
    url: str

    def error(self, name: str, problem: str) -> CheckpointError:
        return CheckpointError(f"{self.url}: {name} is {shown(self.content.get(name))}; {problem}")

    def flag(self, name: str) -> bool:
        value = self.content.get(name, False)
        if value not in (True, False, None):
            raise self.error(name, "true or false is needed")
        return bool(value)

    def rank(self, name: str, value: object) -> int:
        if type(value) is not int or not 0 < value <= _MAX_RANK:
            raise self.error(name, f"whole numbers from 1 to {_MAX_RANK:,} are needed")
        return value

    def number(self, name: str, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e30:
            raise self.error(name, "finite numbers are needed")
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.content.get(name) or {}
        if not isinstance(value, dict):
            raise self.error(name, "a mapping of module to number is needed")
        return value
