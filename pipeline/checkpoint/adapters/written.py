"""The names and the adapter_config.json of an adapter that is written, as peft loads it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping

PREFIX = "base_model.model."


def name_factors(module: str, *, is_embedding: bool) -> tuple[str, str]:
    """Return the names of a module's factors in the file.

    >>> name_factors("model.embed_tokens", is_embedding=True)[0]
    'base_model.model.model.embed_tokens.lora_embedding_A'
    """
    part, last = ("lora_embedding_", "") if is_embedding else ("lora_", ".weight")
    return f"{PREFIX}{module}.{part}A{last}", f"{PREFIX}{module}.{part}B{last}"


def name_whole(name: str, modules: Collection[str]) -> str:
    """Return the name in the file of a tensor that is stored whole; peft wraps modules that have factors.

    Args:
        name: as the model has it.
        modules: that have factors.
    """
    module, _, last = name.rpartition(".")
    return f"{PREFIX}{module}.base_layer.{last}" if module in modules else f"{PREFIX}{name}"


def dump_adapter_config(
    base: str,
    ranks: Mapping[str, int],
    whole: Collection[str],
    *,
    is_turned: bool,
    task: str | None = None,
    has_biases: bool = False,
) -> str:
    """Return the text of adapter_config.json; factors are multiplied with nothing but each other.

    Args:
        base: the model that the adapter is for.
        ranks: of each module's factors.
        whole: tensors that are stored whole, as the model names them.
        is_turned: whether modules store weights as inputs x outputs.
        task: the kind of model, as peft calls it.
        has_biases: whether updates have biases.
    """
    common = Counter(ranks.values()).most_common(1)[0][0] if ranks else 1
    others = {module: rank for module, rank in ranks.items() if rank != common}
    weights = {name.rpartition(".")[0] for name in whole if not name.endswith(".bias")} - ranks.keys()
    biases = [name for name in whole if name.endswith(".bias") and name.rpartition(".")[0] not in weights]
    content = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": common,
        "lora_alpha": common,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": list(ranks),
        "modules_to_save": sorted(weights) or None,
        "bias": "all" if biases else "none",
        "inference_mode": True,
        "lora_dropout": 0.0,
        "fan_in_fan_out": is_turned,
        **({"lora_bias": True} if has_biases else {}),
    }
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"
