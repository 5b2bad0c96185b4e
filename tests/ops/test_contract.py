"""What every op promises, tried on each one that there is."""

from __future__ import annotations

import hashlib
import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from raymerge.ops.kernel import BLOCK_ELEMENTS
from raymerge.ops.registry import Base, Op, load_ops
from tests.ops.engine import run_kernel, run_kernels
from tests.ops.samples import make_kernel, make_sources, num_sample_models

OPS = list(load_ops().values())
VARIANTS: dict[str, list[Any]] = {
    "weight": [(1.0, -0.25, 0.5), (0.5, 0.0, 0.5)],
    "t": [0.0, 0.9],
    "density": [(0.5, 0.2, 1.0)],
    "lambda": [0.4],
}
"""For each parameter that a sweep may vary, values to try."""
PRINT_DIGESTS = "from tests.ops.test_contract import digest_all; print(digest_all())"


def digest_all() -> str:
    """Return a digest of what every op makes of the same inputs."""
    digest = hashlib.sha256()
    for op in OPS:
        merged = run_kernel(make_kernel(op), make_sources(op, 70_001), out_dtype=torch.bfloat16)
        digest.update(merged.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
class TestEveryOp:
    def test_streams_blocks_as_it_merges_whole_tensors(self, op: Op) -> None:
        kernel = make_kernel(op)
        tensors = make_sources(op, 2 * BLOCK_ELEMENTS + 1234)
        whole = run_kernel(kernel, tensors)
        assert torch.equal(run_kernel(kernel, tensors, separate=True), whole)
        assert torch.equal(run_kernel(kernel, tensors), whole)

    def test_leaves_its_inputs_alone(self, op: Op) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            tensors = make_sources(op, 5000, dtype=dtype)
            before = [tensor.clone() for tensor in tensors]
            run_kernel(make_kernel(op), tensors)
            assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))

    @pytest.mark.parametrize("excess", [None, -1, 0, 1])
    def test_fills_tensors_of_any_size(self, op: Op, excess: int | None) -> None:
        kernel = make_kernel(op)
        num_elements = 1 if excess is None else BLOCK_ELEMENTS + excess
        assert run_kernel(kernel, make_sources(op, num_elements)).isfinite().all()

    def test_takes_empty_tensors(self, op: Op) -> None:
        assert run_kernel(make_kernel(op), make_sources(op, 0)).numel() == 0

    def test_keeps_the_shape(self, op: Op) -> None:
        tensors = [tensor.reshape(6, 5, 4) for tensor in make_sources(op, 120)]
        assert run_kernel(make_kernel(op), tensors).shape == (6, 5, 4)

    def test_does_not_depend_on_the_number_of_threads(self, op: Op, num_threads: None) -> None:
        kernel = make_kernel(op)
        tensors = make_sources(op, 3 * BLOCK_ELEMENTS)
        torch.set_num_threads(1)
        one = run_kernel(kernel, tensors)
        torch.set_num_threads(2)
        assert torch.equal(run_kernel(kernel, tensors), one)

    def test_is_a_value(self, op: Op) -> None:
        kernel = make_kernel(op)
        assert pickle.loads(pickle.dumps(kernel)) == kernel
        assert hash(make_kernel(op)) == hash(kernel)
        assert make_kernel(op) == kernel

    def test_gives_the_model_back_where_all_are_the_same(self, op: Op) -> None:
        model = make_sources(op, 70_000, dtype=torch.float32)[0]
        num_sources = len(make_sources(op, 1))
        merged = run_kernel(make_kernel(op), [model.clone() for _ in range(num_sources)])
        torch.testing.assert_close(merged, model, rtol=3e-7, atol=0)

    def test_gives_zero_for_zeros(self, op: Op) -> None:
        zeros = [torch.zeros(1000) for _ in make_sources(op, 1)]
        assert torch.equal(run_kernel(make_kernel(op), zeros), torch.zeros(1000))

    def test_takes_a_base_alone_if_it_says_so(self, op: Op) -> None:
        if op.min_models > 0:
            return
        assert op.base is Base.REQUIRED
        base = torch.randn(1000)
        none = {parameter.name: () for parameter in op.parameters if parameter.per_model}
        assert torch.equal(run_kernel(make_kernel(op, **none), [base]), base)

    def test_says_what_it_is(self, op: Op) -> None:
        assert op.title
        assert op.summary.endswith(".")
        assert op.reference == "" or op.reference.startswith("https://")


def test_depends_neither_on_the_hash_seed_nor_on_the_processor(pytestconfig: pytest.Config) -> None:
    """In fresh processes, one of which does without vector instructions in torch and numpy."""
    changes: list[dict[str, str]] = [
        {"PYTHONHASHSEED": "0", "ATEN_CPU_CAPABILITY": "default", "NPY_DISABLE_CPU_FEATURES": "AVX2 AVX512F"},
        {"PYTHONHASHSEED": "3"},
    ]
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", PRINT_DIGESTS],
            cwd=pytestconfig.rootpath,
            env=os.environ | change,
            stdout=subprocess.PIPE,
            text=True,
        )
        for change in changes
    ]
    digests = {run.communicate()[0].strip() for run in runs}
    assert digests == {digest_all()}


def test_planning_does_not_import_torch() -> None:
    code = "import sys; from raymerge.ops.registry import load_ops; load_ops(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_kernels_that_measure_the_same_share_it(op: Op) -> None:
    """Measured once, combined block by block in turn: the bytes of separate merges."""
    kernels = [make_kernel(op), make_kernel(op)]
    for parameter in op.parameters:
        for value in VARIANTS.get(parameter.name, []):
            change = value[: num_sample_models(op)] if isinstance(value, tuple) else value
            kernels.append(make_kernel(op, **{parameter.name: change}))
    tensors = make_tied_sources(op, 2 * BLOCK_ELEMENTS + 1234)
    for merged, kernel in zip(run_kernels(kernels, tensors), kernels, strict=True):
        assert torch.equal(merged, run_kernel(kernel, tensors))


def make_tied_sources(op: Op, num_elements: int) -> list[torch.Tensor]:
    """Return sources that differ by few values, so that many elements lie on a threshold."""
    base, *models = make_sources(op, num_elements, dtype=torch.float32)
    return [base, *(base + (model - base).mul_(500).round_().div_(512) for model in models)]
