"""Rules for single elements, and the one that CONTRIBUTING.md shows."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Sequence

import pytest
import torch

from raymerge.ops.kernel import Site
from raymerge.ops.kernels.elementwise import Elementwise
from raymerge.ops.own import OwnOps
from raymerge.ops.registry import Base, Op
from tests.ops.engine import run_kernel
from tests.ops.kernel_contract import CHECKS, Case
from tests.ops.samples import make_fine_tunes


def write_weighted(
    tensors: list[torch.Tensor], out: torch.Tensor, scratch: Sequence[torch.Tensor], weights: tuple[float, ...]
) -> None:
    out.zero_()
    for tensor, weight in zip(tensors, weights, strict=True):
        out.add_(torch.mul(tensor, weight, out=scratch[0]))


@pytest.fixture
def between(pytestconfig: pytest.Config) -> Op:
    """The op of CONTRIBUTING.md."""
    text = (pytestconfig.rootpath / "CONTRIBUTING.md").read_text()
    code = next(block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "Elementwise" in block)
    assert len(code.splitlines()) < 35
    return OwnOps("CONTRIBUTING.md", code).ops["between"]


def test_gets_the_sources_in_order_and_the_parameters() -> None:
    tensors = make_fine_tunes(150_001, 2, dtype=torch.float32)
    kernel = Elementwise(write_weighted, ((1.0, -2.0, 0.5),), num_spares=1)
    expected = tensors[0].double() - 2 * tensors[1].double() + 0.5 * tensors[2].double()
    torch.testing.assert_close(run_kernel(kernel, tensors).double(), expected, rtol=0, atol=1e-7)


def test_needs_a_block_for_every_source_and_those_that_the_function_asks_for() -> None:
    assert Elementwise(write_weighted, num_spares=3).num_scratch(Site("w", (2, 3), 4, 0)) == 7


def test_is_told_apart_by_its_function_and_parameters() -> None:
    kernels = {Elementwise(write_weighted, ((1.0,),)), Elementwise(write_weighted, ((2.0,),)), Elementwise(print)}
    assert len(kernels) == 3
    assert Elementwise(write_weighted, ((1.0,),)) in kernels


def test_a_function_within_a_function_cannot_be_sent_to_a_worker() -> None:
    with pytest.raises((pickle.PicklingError, AttributeError)):
        pickle.dumps(Elementwise(lambda tensors, out, scratch: None))


def test_the_example_of_the_guide_does_what_it_says(between: Op) -> None:
    assert (between.name, between.base) == ("between", Base.INPUT)
    tensors = make_fine_tunes(150_001, 3)
    wide = torch.stack(tensors).double()
    low, high = wide.min(0).values, wide.max(0).values
    for t in (0.0, 0.25, 1.0):
        merged = run_kernel(between.kernel({"t": t}), tensors).double()
        torch.testing.assert_close(merged, low + t * (high - low), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_example_of_the_guide_keeps_the_contract(between: Op, check: Callable[[Case], None]) -> None:
    siblings = [between.kernel({"t": t}) for t in (0.0, 0.9)]
    check(Case(between.kernel({}), lambda n: make_fine_tunes(n, 2, dtype=torch.float32), siblings))
