"""Architectures that dense models can be made into: what they call experts and routers, and their config.json."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from raymerge.pipeline.checkpoint.model_config import Json
from raymerge.pipeline.config.merge_config import Mixture
from raymerge.pipeline.errors import ConfigError
from raymerge.pipeline.messages import listing

PROJECTIONS = ("gate_proj", "up_proj", "down_proj")
"""The matrices of an MLP, in llamas and all that are built like them."""

_ATTENTION = frozenset(
    (
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
    )
)
BIASES = tuple(f"self_attn.{name}_proj.bias" for name in "qkv")
"""Biases of query, key and value."""
_NORMS = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")
_LLAMAS = ("llama", "mistral")

_FULL_HEADS: Json = {"num_key_value_heads": None}
_DEFAULTS: Mapping[str, Json] = {
    "llama": {**_FULL_HEADS, "max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768},
    "qwen3": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "head_dim": 128},
}
"""Defaults of each family's config.json in transformers, where those of mixtures are others."""
_COMMON_DEFAULTS: Json = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False}
_ROPE_THETA = 10000.0

_DEEPSEEK_CODE = "deepseek-ai/deepseek-moe-16b-base--"


@dataclass(frozen=True)
class Layout:
    """One architecture of mixtures of experts."""

    title: str
    names: tuple[str, ...]
    """Whole names for `architecture`."""
    families: tuple[str, ...]
    """`model_type` of the models that it can be made of."""
    architecture: str
    model_type: str
    router: str
    """The router's name in a layer."""
    experts: str
    """Beginning of an expert's names in a layer, with a place for its number."""
    projections: Mapping[str, str]
    """Names of an expert's matrices, by those of an MLP."""
    max_shared: int = 0
    min_shared: int = 0
    shared: str = ""
    """Beginning of the shared expert's names in a layer."""
    shared_router: str = ""
    """Name of the vector that says how much the shared expert counts; empty where it always counts in full."""
    optional: tuple[str, ...] = ()
    """Tensors that a layer may have besides the attention of a llama."""
    needs_biases: bool = False
    """Whether query, key and value have biases."""
    has_window_switch: bool = False
    """Whether config.json has a sliding window for some layers, and a switch for it."""
    fields: Json = field(default_factory=dict)
    """Fields of config.json that are the same in all."""
    num_experts_field: str = "num_experts"
    expert_size_field: str = "moe_intermediate_size"

    def explain_misfit(self, mixture: Mixture, family: str, rests: Collection[str]) -> str:
        """Return why a base and its experts cannot become this; empty where they can.

        Args:
            mixture: of which experts.
            family: `model_type` of the base.
            rests: names in a layer of the base, but for its MLP.
        """
        if family not in self.families:
            return f"is made of {' or '.join(self.families)} models"
        shared = mixture.shared_experts
        if len(shared) > self.max_shared:
            most = "one shared expert" if self.max_shared else "no shared experts"
            return f"has {most}; take {len(shared) - self.max_shared} out of `shared_experts`"
        if len(shared) < self.min_shared:
            return "needs one shared expert; list it under `shared_experts`"
        if shared and mixture.needs_prompts:
            if self.shared_router and not shared[0].positive_prompts:
                return "has a router for the shared expert; give it positive_prompts"
            if not self.shared_router and shared[0].positive_prompts:
                return "has no router for the shared expert; give it no prompts"
        if extra := sorted(set(rests) - _ATTENTION - set(self.optional)):
            return f"has no place for {listing(extra)}"
        return ""

    def make_config(self, config: Json, mixture: Mixture, expert_size: int, shared_size: int) -> tuple[Json, list[str]]:
        """Return the mixture's config.json, from a copy of its base's, and warnings.

        Args:
            config: changed in place.
            mixture: of which experts.
            expert_size: rows of an expert's gate projection.
            shared_size: the same of a shared expert.
        """
        warnings = []
        for key, value in {**_DEFAULTS[str(config.get("model_type"))], **_COMMON_DEFAULTS}.items():
            config.setdefault(key, value)
        if config["num_key_value_heads"] is None:
            config["num_key_value_heads"] = config.get("num_attention_heads")
        if config.get("head_dim", 0) is None:
            del config["head_dim"]
        rope = config.get("rope_parameters")
        if not isinstance(rope, dict):
            config.setdefault("rope_theta", _ROPE_THETA)
        elif "rope_theta" not in config:
            rope.setdefault("rope_theta", _ROPE_THETA)
        window = config.get("sliding_window")
        if window is not None and config.get("model_type") == "mistral":
            if self.has_window_switch:
                config |= {"use_sliding_window": True, "max_window_layers": 0}
            elif self.model_type != "mixtral":
                config["sliding_window"] = None
                warnings.append(
                    f"the base attends to {window} tokens (sliding_window), and {self.title} to all; texts that are"
                    " longer come out otherwise"
                )
        elif self.has_window_switch:
            config.setdefault("use_sliding_window", False)
        config.pop("auto_map", None)
        config |= copy.deepcopy(self.fields)
        config |= {"architectures": [self.architecture], "model_type": self.model_type}
        config |= {"num_experts_per_tok": mixture.experts_per_token, self.num_experts_field: len(mixture.experts)}
        config[self.expert_size_field] = expert_size
        if self.shared_router:
            config["shared_expert_intermediate_size"] = shared_size
        elif self.max_shared:
            config["n_shared_experts"] = len(mixture.shared_experts) or None
        return config, warnings


_ONE_BY_ONE: Mapping[str, str] = {name: name for name in PROJECTIONS}
_QWEN: dict[str, Any] = {
    "router": "mlp.gate.weight",
    "experts": "mlp.experts.{}.",
    "projections": _ONE_BY_ONE,
}
_QWEN_FIELDS: Json = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}
LAYOUTS = (
    Layout(
        title="Mixtral",
        names=("mixtral",),
        families=_LLAMAS,
        architecture="MixtralForCausalLM",
        model_type="mixtral",
        router="block_sparse_moe.gate.weight",
        experts="block_sparse_moe.experts.{}.",
        projections={"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
        fields={"output_router_logits": False, "router_aux_loss_coef": 0.001},
        num_experts_field="num_local_experts",
        expert_size_field="intermediate_size",
    ),
    Layout(
        title="DeepSeek-MoE",
        names=("deepseek",),
        families=_LLAMAS,
        architecture="DeepseekForCausalLM",
        model_type="deepseek",
        **_QWEN,
        max_shared=1,
        shared="mlp.shared_experts.",
        fields={
            "first_k_dense_replace": 0,
            "moe_layer_freq": 1,
            "scoring_func": "softmax",
            "norm_topk_prob": True,
            "auto_map": {
                "AutoConfig": f"{_DEEPSEEK_CODE}configuration_deepseek.DeepseekConfig",
                "AutoModel": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekModel",
                "AutoModelForCausalLM": f"{_DEEPSEEK_CODE}modeling_deepseek.DeepseekForCausalLM",
            },
        },
        num_experts_field="n_routed_experts",
    ),
    Layout(
        title="Qwen2-MoE",
        names=("qwen", "qwen2"),
        families=(*_LLAMAS, "qwen2"),
        architecture="Qwen2MoeForCausalLM",
        model_type="qwen2_moe",
        **_QWEN,
        max_shared=1,
        min_shared=1,
        shared="mlp.shared_expert.",
        shared_router="mlp.shared_expert_gate.weight",
        optional=BIASES,
        needs_biases=True,
        has_window_switch=True,
        fields={**_QWEN_FIELDS, "qkv_bias": True},
    ),
    Layout(
        title="Qwen3-MoE",
        names=("qwen", "qwen3"),
        families=("qwen3",),
        architecture="Qwen3MoeForCausalLM",
        model_type="qwen3_moe",
        **_QWEN,
        optional=(*_NORMS, *BIASES),
        has_window_switch=True,
        fields=_QWEN_FIELDS,
    ),
)
"""In the order in which they are chosen where the config names none."""


def choose_layout(mixture: Mixture, base: object, family: str, rests: Sequence[str]) -> Layout:
    """Return the architecture that a mixture becomes: the one that is asked for, or the first that fits.

    Args:
        mixture: of which experts.
        base: the base's name.
        family: its `model_type`.
        rests: names in a layer of the base, but for its MLP.

    Raises:
        ConfigError: none fits.
    """
    asked = [item for item in LAYOUTS if any(name.startswith(mixture.architecture) for name in item.names)]
    reasons = {}
    for layout in asked:
        reason = layout.explain_misfit(mixture, family, rests)
        if not reason:
            return layout
        reasons[layout.title] = reason
    why = "".join(f"\n  {title} {reason}" for title, reason in reasons.items())
    raise ConfigError(f"{base}, of the family {family}, and its experts become no mixture that raymerge makes:{why}")
