"""What the ops declare is what the YAML says."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from raymerge.ops.errors import OpParameterError, UnknownOpError
from raymerge.ops.registry import Base, Parameter, find_op, load_ops

WEIGHT = Parameter("weight", float, per_model=True, default=None)
DENSITY = Parameter("density", float, per_model=True, default=1.0)
EPSILON = Parameter("epsilon", float, per_model=True, default=0.15)
GAMMA = Parameter("gamma", float, per_model=True, default=0.01)


OWN = {"rescale_mode"}
"""Parameters that mergekit does not have."""


def shared(name: str, kind: type, default: Any) -> Parameter:
    return Parameter(name, kind, per_model=False, default=default)


def task_arithmetic_parameters(*, normalize: bool, rescale: bool) -> set[Parameter]:
    return {
        WEIGHT,
        DENSITY,
        shared("normalize", bool, normalize),
        shared("rescale", bool, rescale),
        shared("int8_mask", bool, False),
        shared("lambda", float, 1.0),
    }


@pytest.mark.parametrize(
    ("name", "title", "base", "models", "parameters"),
    [
        ("linear", "Linear", Base.INPUT, (1, None), {WEIGHT, shared("normalize", bool, True)}),
        ("slerp", "SLERP", Base.REQUIRED, (1, 1), {shared("t", float, None)}),
        (
            "nuslerp",
            "NuSLERP",
            Base.OPTIONAL,
            (2, 2),
            {WEIGHT, shared("nuslerp_row_wise", bool, False), shared("nuslerp_flatten", bool, True)},
        ),
        (
            "multislerp",
            "Multi-SLERP",
            Base.OPTIONAL,
            (1, None),
            {WEIGHT, shared("normalize_weights", bool, True), shared("eps", float, 1e-8)},
        ),
        (
            "karcher",
            "Karcher Mean",
            Base.INPUT,
            (1, None),
            {shared("max_iter", int, 10), shared("tol", float, 1e-5)},
        ),
        ("model_stock", "Model Stock", Base.REQUIRED, (2, None), {shared("filter_wise", bool, False)}),
        ("passthrough", "Passthrough", Base.INPUT, (1, 1), {Parameter("scale", float, per_model=True, default=1.0)}),
        (
            "task_arithmetic",
            "Task Arithmetic",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=False, rescale=False),
        ),
        ("ties", "TIES", Base.REQUIRED, (0, None), task_arithmetic_parameters(normalize=True, rescale=False)),
        (
            "dare_linear",
            "Linear DARE",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=False, rescale=True),
        ),
        ("arcee_fusion", "Arcee Fusion", Base.REQUIRED, (1, 1), set()),
        ("nearswap", "NearSwap", Base.REQUIRED, (1, 1), {shared("t", float, None)}),
        ("ram", "Reinforced Agent Merging", Base.REQUIRED, (0, None), {shared("epsilon", float, 1e-5)}),
        (
            "ramplus_tl",
            "Reinforced Agent Merging Plus (Tensor-Local)",
            Base.REQUIRED,
            (0, None),
            {shared("r", float, 0.1), shared("alpha", float, 0.2), shared("epsilon", float, 1e-5)},
        ),
        (
            "sce",
            "SCE",
            Base.REQUIRED,
            (0, None),
            {shared("int8_mask", bool, False), shared("select_topk", float, 1.0)},
        ),
        ("dare_ties", "DARE TIES", Base.REQUIRED, (0, None), task_arithmetic_parameters(normalize=False, rescale=True)),
        (
            "della",
            "DELLA",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=True, rescale=True) | {EPSILON},
        ),
        (
            "della_linear",
            "Linear DELLA",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=False, rescale=True) | {EPSILON},
        ),
        (
            "breadcrumbs",
            "Model Breadcrumbs",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=False, rescale=False) | {GAMMA},
        ),
        (
            "breadcrumbs_ties",
            "Model Breadcrumbs with TIES",
            Base.REQUIRED,
            (0, None),
            task_arithmetic_parameters(normalize=False, rescale=False) | {GAMMA},
        ),
    ],
)
def test_declares_what_mergekit_takes(
    name: str, title: str, base: Base, models: tuple[int, int | None], parameters: set[Parameter]
) -> None:
    op = find_op(name)
    assert (op.title, op.base, (op.min_models, op.max_models)) == (title, base, models)
    assert {replace(p, range=None) for p in op.parameters if p.name not in OWN} == parameters


def test_a_string_has_the_values_that_its_type_lists() -> None:
    mode = next(p for p in find_op("dare_ties").parameters if p.name == "rescale_mode")
    assert mode == Parameter("rescale_mode", str, False, "l1", ("l1", "inverse_density"))


def test_lists_ops_in_alphabetical_order() -> None:
    assert list(load_ops()) == sorted(load_ops())


def test_an_unknown_op_gets_its_nearest_name() -> None:
    with pytest.raises(UnknownOpError, match="'tie' is unknown; did you mean 'ties'"):
        find_op("tie")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_refuses_what_is_not_finite(value: float) -> None:
    with pytest.raises(OpParameterError, match="not finite"):
        find_op("slerp").kernel({"t": value})
    with pytest.raises(OpParameterError, match="not finite"):
        find_op("ties").kernel({"weight": (1.0, value)})


def test_an_unknown_op_without_a_near_name() -> None:
    with pytest.raises(UnknownOpError, match=r"'zzzz' is unknown\. There are: \w+, \w+"):
        find_op("zzzz")
