from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from raymerge.ops.errors import OpParameterError
from raymerge.ops.registry import find_op
from raymerge.pipeline.checkpoint.reference import ModelRef
from raymerge.pipeline.checkpoint.source import StoredTensor
from raymerge.pipeline.config.values import Rule, Setting, Settings
from raymerge.pipeline.errors import ConfigError, TensorMismatchError
from raymerge.pipeline.plan.sources.resolve import COPY, Part, Scope, make_tensor_merge, promote
from raymerge.pipeline.plan.types import TensorMerge
from raymerge.pipeline.stores.files import StoredFile
from tests.pipeline.plan.layouts import parameters_of


def settings(**values: float) -> Settings:
    return {name: Setting((Rule(None, (value,)),)) for name, value in values.items()}


def part(
    model: str,
    given: Settings | None = None,
    *,
    name: str = "w",
    dtype: str = "BF16",
    shape: tuple[int, ...] = (2, 3),
) -> Part:
    tensor = StoredTensor(model, name, dtype, shape, StoredFile(model, 100, ""), 0, 12)
    return Part(ModelRef(model), name, tensor, (given or {},))


def scope(op: str, given: Settings | None = None, *, base: str | None = None, out_dtype: str | None = None) -> Scope:
    return Scope(find_op(op), ModelRef(base) if base else None, (given or {},), out_dtype)


def merged(parts: list[Part], where: Scope, *, name: str = "w", position: float = 0.0) -> TensorMerge:
    return make_tensor_merge(name, parts, where, position, seed=0)


def parameters(merge: TensorMerge) -> Mapping[str, Any]:
    return parameters_of(merge)


def test_one_value_for_each_model_in_config_order() -> None:
    merge = merged(
        [part("a", settings(weight=1.0)), part("b", settings(weight=2.0)), part("c")],
        scope("linear", settings(weight=3.0)),
    )
    assert parameters(merge) == {"weight": (1.0, 2.0, 3.0), "normalize": True}
    assert [source.model for source in merge.sources] == ["a", "b", "c"]


def test_a_required_base_comes_first_and_takes_no_parameters() -> None:
    parts = [part("a", settings(weight=1.0)), part("base", settings(weight=9.0)), part("c", settings(weight=2.0))]
    merge = merged(parts, scope("task_arithmetic", base="base"))
    assert [source.model for source in merge.sources] == ["base", "a", "c"]
    assert parameters(merge)["weight"] == (1.0, 2.0)


def test_gradients_are_taken_at_the_position() -> None:
    rising = {"t": Setting((Rule(None, (0.0, 1.0)),))}
    assert parameters(merged([part("a"), part("b")], scope("slerp", rising, base="a"), position=0.25)) == {"t": 0.25}


def test_filters_see_the_inputs_name_for_one_models_parameter_and_the_outputs_for_a_shared_one() -> None:
    by_input = {"weight": Setting((Rule("layers.7.", (7.0,)), Rule("layers.0.", (0.5,)), Rule(None, (1.0,))))}
    by_output = {"normalize": Setting((Rule("layers.0.", (False,)), Rule(None, (True,))))}
    merge = merged(
        [part("a", by_input, name="layers.7.w"), part("b", by_input, name="layers.3.w")],
        scope("linear", by_output),
        name="layers.0.w",
    )
    assert parameters(merge) == {"weight": (7.0, 1.0), "normalize": False}


def test_a_level_whose_filters_all_miss_leaves_it_to_the_next() -> None:
    missing = {"weight": Setting((Rule("mlp", (9.0,)),))}
    merge = merged([part("a", missing)], Scope(find_op("linear"), None, (missing, settings(weight=2.0)), None))
    assert parameters(merge)["weight"] == (2.0,)


def test_a_missing_parameter_is_named_with_its_model_and_tensor() -> None:
    with pytest.raises(ConfigError, match=r"linear needs 'weight' for model b \(tensor x\.w\)"):
        merged([part("a", settings(weight=1.0)), part("b", name="x.w")], scope("linear"))
    with pytest.raises(ConfigError, match=r"slerp needs 't' \(tensor w\)"):
        merged([part("a"), part("b")], scope("slerp", base="a"))


def test_what_the_op_refuses_is_said_with_the_tensor() -> None:
    parts = [part("a", settings(weight=1.0)), part("b", settings(weight=-1.0))]
    with pytest.raises(OpParameterError, match=r"linear, tensor w: .*1\.0, -1\.0 sum to 0"):
        merged(parts, scope("linear"))


@pytest.mark.parametrize(
    ("shapes", "hint"),
    [
        (((4, 2), (5, 2)), True),
        (((4, 2), (4, 3)), False),
        (((4,), (5,)), False),
        (((4, 2), (8,)), False),
        (((), (1,)), False),
    ],
)
def test_shapes_that_differ(shapes: tuple[tuple[int, ...], tuple[int, ...]], hint: bool) -> None:
    with pytest.raises(TensorMismatchError) as caught:
        merged([part("a", shape=shapes[0]), part("b", shape=shapes[1])], scope("linear", settings(weight=1.0)))
    message = str(caught.value)
    assert message.startswith(f"w is {list(shapes[0])} in a and {list(shapes[1])} in b")
    assert ("tokenizer_source" in message) is hint


@pytest.mark.parametrize(
    ("dtypes", "wanted", "expected", "nbytes"),
    [
        (("BF16", "BF16"), None, "BF16", 12),
        (("F16", "BF16"), None, "F32", 24),
        (("F32", "F16"), None, "F32", 24),
        (("F64", "BF16"), None, "F64", 48),
        (("F32", "F32"), "F16", "F16", 12),
        (("BF16", "F32"), "F64", "F64", 48),
    ],
)
def test_the_dtype_of_the_output(dtypes: tuple[str, str], wanted: str | None, expected: str, nbytes: int) -> None:
    parts = [part("a", dtype=dtypes[0]), part("b", dtype=dtypes[1])]
    merge = merged(parts, scope("linear", settings(weight=1.0), out_dtype=wanted))
    assert (merge.out_dtype, merge.nbytes, merge.num_elements) == (expected, nbytes, 6)


def test_promotion_does_not_depend_on_the_order() -> None:
    for dtypes in (["BF16", "F16"], ["F32", "BF16"], ["F64", "F32"], ["F16", "F64", "BF16"]):
        assert promote(dtypes) == promote(dtypes[::-1]) not in ("BF16", "F16")


@pytest.mark.parametrize("dtype", ["I64", "U8", "BOOL", "I32"])
def test_tensors_that_are_not_floating_point_are_copied_as_they_are(dtype: str) -> None:
    merge = merged([part("a", dtype=dtype), part("b", dtype=dtype)], scope("linear", out_dtype="BF16"))
    assert (merge.op, merge.out_dtype, parameters_of(merge), merge.nbytes) == (COPY, dtype, {}, 12)
    assert len(merge.sources) == 2, "both are read, for they have to be equal"


@pytest.mark.parametrize("dtypes", [("I64", "I32"), ("I64", "BF16"), ("BF16", "U8")])
def test_dtypes_that_cannot_be_merged(dtypes: tuple[str, str]) -> None:
    with pytest.raises(TensorMismatchError, match=f"w is {dtypes[0]} in a and {dtypes[1]} in b"):
        merged([part("a", dtype=dtypes[0]), part("b", dtype=dtypes[1])], scope("linear", settings(weight=1.0)))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3"])
def test_quantised_tensors_are_refused(dtype: str) -> None:
    with pytest.raises(TensorMismatchError, match=f"w in a is {dtype}, quantised"):
        merged([part("a", dtype=dtype)], scope("passthrough"))


@pytest.mark.parametrize(("shape", "num_elements"), [((), 1), ((0,), 0), ((3, 0, 2), 0), ((1, 1), 1)])
def test_scalars_and_empty_tensors(shape: tuple[int, ...], num_elements: int) -> None:
    merge = merged([part("a", shape=shape)], scope("passthrough"))
    assert (merge.shape, merge.num_elements, merge.nbytes) == (shape, num_elements, 2 * num_elements)


def test_the_donors_integers_are_taken_from_tensors_of_one_dtype_alone() -> None:
    parts = [part("a", dtype="I64"), part("b", dtype="I64")]
    for donor, model in (("a", "a"), ("b", "b"), ("c", "a")):
        merge = merged(parts, replace(scope("linear"), integers="donor", donor=ModelRef(donor)))
        assert [source.model for source in merge.sources] == [model]
    for others in (part("b", dtype="I32"), part("b", dtype="BF16")):
        for ordered in ([parts[0], others], [others, parts[0]]):
            with pytest.raises(TensorMismatchError, match="must be the same everywhere"):
                merged(ordered, replace(scope("linear"), donor=ModelRef("b")))


@pytest.mark.parametrize(
    ("patterns", "dtype", "expected"),
    [((), "F32", "BF16"), (("*w",), "F32", "F32"), (("W",), "F32", "BF16"), (("*",), "F16", "BF16")],
)
def test_float32_on_purpose(patterns: tuple[str, ...], dtype: str, expected: str) -> None:
    where = replace(scope("linear", settings(weight=1.0), out_dtype="BF16"), keep_float32=patterns)
    assert merged([part("a", dtype=dtype), part("b")], where).out_dtype == expected


def test_float64_is_kept_where_it_is_asked_for() -> None:
    where = replace(scope("linear", settings(weight=1.0), out_dtype="F64"), keep_float32=("*",))
    assert merged([part("a", dtype="F32")], where).out_dtype == "F64"
