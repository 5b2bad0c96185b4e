"""What kernels promise, tried on every op and on examples; and on offenders, so that each check is known to fail."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass

import pytest
import torch

from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.kernels.copy import Identical
from raymerge.ops.registry import Base, Op, load_ops
from raymerge.ops.sums import add_blocks
from tests.ops import kernel_contract as contract
from tests.ops.engine import NAME, Engine, run_kernel
from tests.ops.examples import LowRankDelta
from tests.ops.kernel_contract import CHECKS, Case, assert_close, assert_rounded_once
from tests.ops.samples import (
    CASES,
    NO_CHANGE,
    Change,
    list_changes,
    make_fine_tunes,
    make_kernel,
    make_sources,
    make_tied_sources,
    repeat,
    sample_parameters,
)
from tests.references import find_exact

OPS = list(load_ops().values())
PRINT_DIGESTS = "from tests.ops.test_kernel import digest_all; print(digest_all())"
Check = Callable[[Case], None]


def make_case(op: Op, change: Change = NO_CHANGE) -> Case:
    siblings = [make_kernel(op, other) for other in list_changes(op)]
    return Case(
        make_kernel(op, change), lambda n: make_tied_sources(op, n), siblings, again=lambda: make_kernel(op, change)
    )


def fine_tunes(num_elements: int) -> list[torch.Tensor]:
    return make_fine_tunes(num_elements, 1, dtype=torch.float32)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_every_op(op: Op, check: Check) -> None:
    check(make_case(op))


@pytest.mark.parametrize(("op", "change"), CASES)
@pytest.mark.parametrize(
    "check",
    [contract.check_declares_its_memory, contract.check_runs_on_other_devices],
    ids=lambda check: check.__name__,
)
def test_every_op_with_other_parameters(op: Op, change: Change, check: Check) -> None:
    check(make_case(op, change))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("op", "change"), CASES)
def test_every_op_equals_its_formula(op: Op, change: Change, dtype: torch.dtype) -> None:
    tensors = make_sources(op, 150_001, dtype=dtype)
    exact = find_exact(op.name, tensors, sample_parameters(op, change), name=NAME, seed=7)
    merged = run_kernel(make_kernel(op, change), tensors, seed=7)
    assert_close(merged, exact)
    assert_rounded_once(merged.bfloat16(), exact)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
class TestEveryOp:
    def test_gives_the_model_back_where_all_are_the_same(self, op: Op) -> None:
        model = make_sources(op, 70_000, dtype=torch.float32)[0]
        merged = run_kernel(make_kernel(op), repeat(op, model)).float()
        torch.testing.assert_close(merged, model, rtol=3e-7, atol=0)

    def test_gives_zero_for_zeros(self, op: Op) -> None:
        assert not run_kernel(make_kernel(op), repeat(op, torch.zeros(1000))).any()

    def test_says_what_it_is(self, op: Op) -> None:
        assert op.title
        assert op.summary.endswith(".")
        assert op.reference == "" or op.reference.startswith("https://")
        for text in (op.formula, op.when, op.not_when, op.source):
            assert text.endswith("."), f"{op.name}'s docstring lacks `Formula:`, `When:`, `Not when:` or `Source:`"
        assert make_kernel(op).family


@pytest.mark.parametrize("op", [op for op in OPS if op.min_models == 0], ids=lambda op: op.name)
def test_takes_a_base_alone_if_it_says_so(op: Op) -> None:
    assert op.base is Base.REQUIRED
    base = torch.randn(1000)
    none = {parameter.name: () for parameter in op.parameters if parameter.per_model}
    assert torch.equal(run_kernel(make_kernel(op, none), [base]), base)


def digest_all() -> str:
    """Return a digest of what every op makes of the same inputs, where it promises the same bits."""
    digest = hashlib.sha256()
    for op in [op for op in OPS if not make_kernel(op).tolerance]:
        merged = run_kernel(make_kernel(op), make_sources(op, 70_001)).bfloat16()
        digest.update(merged.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


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


def make_bytes(num_elements: int) -> list[torch.Tensor]:
    return [torch.arange(num_elements, dtype=torch.int64).to(torch.uint8) for _ in range(3)]


MATRICES = ((40, 75), (75, 40), (3, 1000))
LOW_RANK = Case(LowRankDelta(3), fine_tunes, [LowRankDelta(1), LowRankDelta(2)], MATRICES)
IDENTICAL = Case(Identical(), make_bytes, [Identical()])


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("case", [pytest.param(LOW_RANK, id="low rank"), pytest.param(IDENTICAL, id="identical")])
def test_every_example(case: Case, check: Check) -> None:
    check(case)


def test_takes_whole_matrices() -> None:
    """With full rank the model itself comes back; with rank 1 the closest matrix of rank 1."""
    base, model = (tensor.reshape(40, 75) for tensor in fine_tunes(3000))
    engine = Engine([base, model])
    whole, first = engine.run(LowRankDelta(40), LowRankDelta(1))
    torch.testing.assert_close(whole, model, rtol=0, atol=1e-6)
    delta = (model - base).double()
    left, values, right = torch.linalg.svd(delta, full_matrices=False)
    torch.testing.assert_close((first - base).double(), values[0] * left[:, :1] @ right[:1], rtol=0, atol=1e-6)
    assert engine.figures == [{"largest": pytest.approx(values[0].item(), rel=1e-5)}] * 2


@dataclass(frozen=True)
class Offender(Kernel):
    """Subtracts the mean of source 0 from source 1, and breaks a promise if it has a vice."""

    vice: str = ""
    shift: float = 0.0

    def num_passes(self, site: Site) -> int:
        return 2 if self.vice == "plans by name" and site.name == NAME else 1

    def num_scratch(self, site: Site) -> int:
        return 1

    def measuring(self, site: Site) -> Hashable:
        return Offender, self.vice

    def start(self, site: Site) -> KernelRun:
        return OffendingRun(self, site)

    def __reduce__(self) -> tuple[type[Offender], tuple[str, float]]:
        return Offender, ("" if self.vice == "loses a field" else self.vice, self.shift)


class OffendingRun(KernelRun):
    runs = 0

    def __init__(self, kernel: Offender, site: Site) -> None:
        self.kernel, self.site = kernel, site
        self.vice = kernel.vice
        self.total = self.mean = 0.0
        self.kept: list[torch.Tensor] = []
        self.num_blocks = 0
        OffendingRun.runs += 1

    def measure(self, index: int, block: Block) -> None:
        (x,) = block.scratch
        block.load(0, x)
        if self.vice == "sums over what it gets":
            self.total += x.sum().item()
        else:
            self.total = add_blocks(self.total, x)
        if self.vice == "keeps blocks":
            self.kept.append(x.clone())

    def end_pass(self, index: int) -> None:
        num_elements = self.site.shape[0] if self.vice == "counts rows" else self.site.num_elements
        self.mean = self.total / max(1, num_elements)

    def combine(self, block: Block, out: torch.Tensor) -> None:
        (x,) = block.scratch
        if self.vice == "adds to what is there":
            out.add_(block.load(1, x))
        else:
            block.load(1, out)
        match self.vice:
            case "writes beside its scratch":
                x.as_strided((1,), (1,), x.storage_offset() + len(x)).zero_()
            case "changes inputs":
                block.sources[1].mul_(0.5)  # type: ignore[attr-defined]
            case "leaves the last element out" if len(out) > 1:
                out[-1] = torch.nan
            case "allocates a block":
                x = torch.zeros_like(out)
            case "counts the runs":
                out.add_(OffendingRun.runs)
            case "counts blocks":
                out.add_(self.num_blocks)
            case "works on the host":
                torch.zeros(len(out)).add_(out)
        self.num_blocks += 1
        out.sub_(self.mean).add_(self.kernel.shift)

    def share(self, kernel: Kernel) -> KernelRun:
        assert isinstance(kernel, Offender)
        if self.vice == "shares itself":
            return self
        run = OffendingRun(kernel, self.site)
        run.mean = self.mean
        if self.vice == "copies to share":
            run.kept = [torch.zeros(2**17) for _ in range(3)]
        return run

    def figures(self) -> Mapping[str, float]:
        return {"mean": self.mean}


def make_offender(vice: str) -> Case:
    sibling = Offender(vice, shift=0.5)
    return Case(Offender(vice), lambda n: [x + 1 for x in fine_tunes(n)], [sibling], again=lambda: Offender(vice))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_a_kernel_without_vices_keeps_the_contract(check: Check) -> None:
    check(make_offender(""))


@pytest.mark.parametrize(
    ("vice", "check"),
    [
        ("sums over what it gets", contract.check_streams_blocks_as_it_merges_whole_tensors),
        ("counts blocks", contract.check_streams_blocks_as_it_merges_whole_tensors),
        ("leaves the last element out", contract.check_fills_tensors_of_any_size),
        ("adds to what is there", contract.check_fills_tensors_of_any_size),
        ("counts rows", contract.check_looks_at_elements_only),
        ("keeps blocks", contract.check_declares_its_memory),
        ("copies to share", contract.check_declares_its_memory),
        ("allocates a block", contract.check_declares_its_memory),
        ("writes beside its scratch", contract.check_declares_its_memory),
        ("loses a field", contract.check_is_a_value),
        ("plans by name", contract.check_plans_by_shape_alone),
        ("shares itself", contract.check_shares_what_it_measures),
        ("counts the runs", contract.check_gives_the_same_bits_again),
        ("changes inputs", contract.check_leaves_its_inputs_alone),
        ("works on the host", contract.check_runs_on_other_devices),
    ],
)
def test_the_contract_finds_offenders(vice: str, check: Check) -> None:
    with pytest.raises(AssertionError):
        check(make_offender(vice))
