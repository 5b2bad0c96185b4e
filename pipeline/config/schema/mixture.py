"""The schema of mixtures of experts."""

from __future__ import annotations

from raymerge.pipeline.config.merge_config import RANDOM_GATES
from raymerge.pipeline.config.mixture import ARCHITECTURES, GATE_MODES, MIXTURE, MIXTURE_KEYS
from raymerge.pipeline.config.schema.parts import COUNT, NAME, NUMBER, TITLE, make_dtype, make_list, make_object, refer
from raymerge.pipeline.config.sections.search import SEARCH, SEARCH_SCHEMA
from raymerge.pipeline.config.sections.sweep import SWEEP, SWEEP_SCHEMA

_PROMPTS = {"type": ["array", "null"], "items": {"type": "string"}}
_NUMBER_OR_TEXT = {"anyOf": [{"type": ["number", "null"]}, {"type": "string", "pattern": NUMBER}]}
_EXPERT = make_object(
    {
        "source_model": {**refer("model"), "description": "The model whose MLPs become the expert."},
        "positive_prompts": {**_PROMPTS, "description": "Texts that are to choose it."},
        "negative_prompts": {**_PROMPTS, "description": "Texts that are not."},
        "residual_scale": {**_NUMBER_OR_TEXT, "description": "Factor of what it adds; default 1."},
        "noise_scale": {**_NUMBER_OR_TEXT, "description": "Standard deviation of noise on its weights; default 0."},
    },
    "source_model",
)
IS_MIXTURE = {
    "anyOf": [{"required": [key]} for key in MIXTURE_KEYS]
    + [{"required": ["merge_method"], "properties": {"merge_method": {"const": MIXTURE}}}]
}
MIXTURE_SCHEMA = {
    **make_object(
        {
            "name": TITLE,
            "merge_method": {"enum": [MIXTURE, None]},
            "base_model": {**refer("model"), "description": "The model that gives all but the experts."},
            "experts": make_list(_EXPERT, "Models whose MLPs become the experts of each layer."),
            "shared_experts": {"anyOf": [{"type": "null"}, {"type": "array", "items": _EXPERT}]},
            "gate_mode": {"enum": [*GATE_MODES, None], "description": "What routers are made of; default hidden."},
            "experts_per_token": {**COUNT, "description": "Experts that each token passes through; default 2."},
            "architecture": {
                "description": "What the mixture becomes; by default the first that fits.",
                "anyOf": [{"enum": [*ARCHITECTURES, None]}, NAME],
            },
            "dtype": make_dtype("What is written, where `out_dtype` says nothing else."),
            "out_dtype": make_dtype("What is written."),
            SWEEP: SWEEP_SCHEMA,
            SEARCH: SEARCH_SCHEMA,
        },
        "base_model",
        "experts",
    ),
    "if": {"properties": {"gate_mode": {"not": {"enum": [*RANDOM_GATES]}}}},
    "then": {"properties": {"experts": {"items": {"required": ["positive_prompts"]}}}},
}
