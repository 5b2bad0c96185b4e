"""Configs of mixtures of experts, as mergekit-moe takes them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial

from raymerge.ops.registry import Op, find_op
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.config.document import Document
from raymerge.pipeline.config.fields import parse_dtype, parse_name
from raymerge.pipeline.config.merge_config import RANDOM_GATES, Expert, MergeConfig, Mixture
from raymerge.pipeline.config.node import Place
from raymerge.pipeline.config.reference import NO_MODEL, ParseModel
from raymerge.pipeline.messages import counted, shown, suggest

MIXTURE = "moe"
"""`merge_method` of a mixture of experts; mergekit-moe's own configs have none."""
GATE_MODES = ("hidden", "hidden_last", "hidden_avg", "cheap_embed", "random", "uniform_random")
ARCHITECTURES = ("mixtral", "deepseek", "qwen", "qwen2", "qwen3")
"""Beginnings of the names of what a mixture may become."""
EXPERT_KEYS = ("source_model", "positive_prompts", "negative_prompts", "residual_scale", "noise_scale")

MIXTURE_KEYS = ("experts", "gate_mode", "shared_experts", "experts_per_token")
KEYS = ("name", "merge_method", "base_model", "architecture", "dtype", "out_dtype", *MIXTURE_KEYS)
_DEFAULT_NUM_CHOSEN = 2


def is_mixture(root: Place) -> bool:
    """Tell whether a config makes a mixture of experts, whatever else is wrong with it."""
    return root.get("merge_method").value == MIXTURE or any(key in root.names() for key in MIXTURE_KEYS)


@cache
def find_mixture_op() -> Op:
    """Return the op of a mixture's tensors, which are those of its models."""
    return replace(
        find_op("passthrough"),
        name=MIXTURE,
        title="Mixture of experts",
        reference="https://github.com/arcee-ai/mergekit/blob/main/docs/moe.md",
    )


def read_mixture(root: Place, document: Document, parse_model: ParseModel) -> MergeConfig | None:
    """Return the mixture that a config describes; None where something is wrong with it, which is noted.

    Args:
        root: the config.
        document: whose content it is.
        parse_model: returns the model that is named at a place.
    """
    if (method := root.get("merge_method")).value not in (None, MIXTURE):
        problem = f"{shown(method.value)} is given, and experts make a mixture"
        if root.get("models") or root.get("slices") or root.get("modules"):
            root.note(method.error(f"{problem}; write {MIXTURE!r}, and leave out what else is merged"))
            return None
        method.warn(f"{problem}: ignored, as mergekit-moe does; write {MIXTURE!r}")
    root.check_keys(KEYS)
    base = root.attempt(partial(_read_base, parse_model=parse_model))
    dtypes = [root.get(key).attempt(parse_dtype) for key in ("dtype", "out_dtype")]
    name = root.get("name").attempt(parse_name)
    gate_mode = root.get("gate_mode").attempt(_parse_gate_mode) or ""
    architecture = root.get("architecture").attempt(_parse_architecture) or ""
    needs_prompts = gate_mode not in ("", *RANDOM_GATES)
    read = partial(_read_expert, parse_model=parse_model, needs_prompts=needs_prompts)
    experts = [place.attempt(read) for place in root.attempt(_list_experts) or ()]
    read = partial(_read_expert, parse_model=parse_model, needs_prompts=False)
    shared = [place.attempt(read) for place in root.get("shared_experts").attempt(_list_shared) or ()]
    num_chosen = root.get("experts_per_token").attempt(partial(_parse_num_chosen, num_experts=len(experts)))
    if root.findings.errors or num_chosen is None:
        return None
    mixture = Mixture(gate_mode, tuple(filter(None, experts)), tuple(filter(None, shared)), num_chosen, architecture)
    _warn_of_alike(root, mixture)
    return MergeConfig(
        op=find_mixture_op(),
        models=(),
        slices=(),
        base_model=base,
        dtype=dtypes[0],
        out_dtype=dtypes[1],
        keep_float32=(),
        integers="equal",
        parameters={},
        text=document.text,
        warnings=root.findings.list_warnings(document),
        notes=tuple(dict.fromkeys(root.findings.notes)),
        name=name,
        mixture=mixture,
    )


def _read_base(root: Place, parse_model: ParseModel) -> ModelRef:
    if root.get("base_model").value is None:
        problem = "is missing: the model that gives all but the experts; add `base_model: <one of the experts' models>`"
        raise root.missing("base_model", problem)
    return parse_model(root.get("base_model"))


def _list_shared(place: Place) -> list[Place]:
    return list(place.elements()) if place else []


def _list_experts(root: Place) -> list[Place]:
    place = root.get("experts")
    if not place:
        raise root.missing("experts", "no experts are given; list models to take them from, each as `source_model`")
    return list(place.elements())


def _read_expert(place: Place, parse_model: ParseModel, *, needs_prompts: bool) -> Expert:
    if isinstance(place.value, str):
        raise place.error(f"{shown(place.value)} is given, a mapping is needed; write `- source_model: {place.value}`")
    place.check_keys(EXPERT_KEYS)
    if place.get("source_model").value is None:
        raise place.missing("source_model", NO_MODEL)
    model = parse_model(place.get("source_model"))
    positive, negative = (_parse_prompts(place.get(key)) for key in ("positive_prompts", "negative_prompts"))
    if needs_prompts and not positive:
        raise place.missing(
            "positive_prompts",
            f"no prompts are given, and the router is made of them: list texts that {model} is to answer, or choose"
            " `gate_mode: random`",
        )
    residual = _parse_number(place.get("residual_scale"), 1.0)
    noise = _parse_number(place.get("noise_scale"), 0.0)
    if noise < 0:
        raise place.get("noise_scale").error(f"{noise:g} is given; a standard deviation is 0 or more")
    return Expert(model, positive, negative, residual, noise)


def _parse_prompts(place: Place) -> tuple[str, ...]:
    """Return texts; one may be empty, as people leave it where the router is random."""
    prompts = place.elements() if place.value is not None else ()
    return tuple(prompt.value if isinstance(prompt.value, str) else prompt.text() for prompt in prompts)


def _parse_number(place: Place, default: float) -> float:
    """Return a finite number; one such as 1e-3 is a string to YAML 1.1."""
    if place.value is None:
        return default
    try:
        number = float(place.value) if isinstance(place.value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        number = math.nan
    if isinstance(place.value, bool) or not math.isfinite(number):
        raise place.error(f"{shown(place.value)} is given, a number is needed")
    return number


def _parse_gate_mode(place: Place) -> str:
    mode = "hidden" if place.value is None else place.text()
    if mode not in GATE_MODES:
        raise place.error(f"{mode!r} is unknown; {suggest(mode, GATE_MODES)}")
    return "hidden_last" if mode == "hidden" else mode


def _parse_architecture(place: Place) -> str:
    if place.value is None:
        return ""
    name = "".join(sign for sign in place.text().lower() if sign.isalnum()).removesuffix("moe")
    if not any(known.startswith(name) for known in ARCHITECTURES):
        raise place.error(f"{shown(place.value)} is unknown; {suggest(name, ARCHITECTURES)}")
    return name


def _parse_num_chosen(place: Place, num_experts: int) -> int:
    number = _DEFAULT_NUM_CHOSEN if place.value is None else place.value
    if type(number) is not int or number < 1:
        raise place.error(f"{shown(place.value)} is given; write how many experts each token passes through, 1 or more")
    if 0 < num_experts < number:
        by_default = " by default" if place.value is None else ""
        raise place.error(
            f"each token passes through {number}{by_default}, and there {'are' if num_experts > 1 else 'is'}"
            f" {counted(num_experts, 'expert')}; list more under `experts`, or write `experts_per_token: {num_experts}`"
        )
    return number


def _warn_of_alike(root: Place, mixture: Mixture) -> None:
    """Warn of experts that no router can tell apart, and of experts that are all the same."""
    experts = mixture.experts
    places: Sequence[Place] = list(root.get("experts").elements())
    first: dict[tuple[frozenset[str], frozenset[str]], int] = {}
    for number, expert in enumerate(experts if mixture.needs_prompts else ()):
        key = frozenset(expert.positive_prompts), frozenset(expert.negative_prompts)
        same = first.setdefault(key, number)
        if same != number:
            places[number].get("positive_prompts").warn(
                f"{expert.model} has the prompts of experts[{same}], {experts[same].model}, so that the router gives"
                " both the same weight for every token; give each its own"
            )
    if len(experts) > 1 and len({replace(e, positive_prompts=(), negative_prompts=()) for e in experts}) == 1:
        root.get("experts").warn(
            f"all {len(experts)} experts are {experts[0].model}, so that the mixture does what one of them does until"
            " it is trained; a noise_scale makes them differ"
        )
