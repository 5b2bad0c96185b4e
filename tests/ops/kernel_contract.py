"""What every kernel promises, one check for each promise; `CHECKS` has all of them."""

from __future__ import annotations

import pickle
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import pytest
import torch

from raymerge.ops.kernel import BLOCK_ELEMENTS, Kernel, Site
from raymerge.ops.stored import LOOP_DTYPES
from tests.fake_gpu import DEVICE, FakeGpu, send
from tests.ops.engine import NAME, AllocationMeter, Engine, MemoryBlock, run_kernel
from tests.ops.loop_engine import LoopEngine
from tests.references import Exact

SLACK_NBYTES = 128 * 2**10
"""What a call may allocate without a word, besides Python's objects: a quarter of a block of float32."""


@dataclass
class Case:
    """A kernel, and how to try it."""

    kernel: Kernel
    make_sources: Callable[[int], list[torch.Tensor]]
    """Returns sources of so many elements, flat."""
    siblings: Sequence[Kernel] = ()
    """Kernels for the same sources, some of which measure the same."""
    shapes: Sequence[tuple[int, ...]] = ((40, 3351), (134_040,), (1, 8, 3, 5585))
    """To try, all of them with the same elements; the first one is the usual one."""
    again: Callable[[], Kernel] | None = field(default=None)
    """Makes the kernel once more."""
    has_columns: bool = False
    """Whether values depend on the shape where blocks do not."""

    def sources(self, shape: tuple[int, ...] = ()) -> list[torch.Tensor]:
        shape = shape or self.shapes[0]
        return [tensor.reshape(shape) for tensor in self.make_sources(torch.Size(shape).numel())]

    def site(self, shape: tuple[int, ...] = ()) -> Site:
        return Site(NAME, shape or self.shapes[0], len(self.make_sources(1)), 0)

    def large(self, num_elements: int) -> tuple[int, ...]:
        """Return a shape of about so many elements, or the usual one for a kernel that takes the whole tensor."""
        if self.takes_whole():
            return self.shapes[0]
        row = self.shapes[0][-1] if self.looks_at_rows() else num_elements
        return (num_elements // row, row)

    def is_same(self, merged: torch.Tensor, expected: torch.Tensor, sources: Sequence[torch.Tensor]) -> bool:
        """Return whether results of the same sources are the same bits, or as near as the kernel says."""
        if not self.kernel.tolerance:
            return torch.equal(merged, expected)
        change = (expected.double() - sources[0]).norm() + 1e-7 / self.kernel.tolerance * expected.norm()
        return bool((merged.double() - expected).norm() <= self.kernel.tolerance * change)

    def looks_at_rows(self) -> bool:
        """Return whether a block is as many rows as there is room for, or the kernel works on columns."""
        grids = {self.kernel.grid(self.site(shape)) for shape in self.shapes}
        return self.has_columns or (len(grids) > 1 and not self.takes_whole())

    def takes_whole(self) -> bool:
        """Return whether a block is the whole tensor."""
        return all(self.kernel.grid(self.site(shape)) == self.site(shape).num_elements for shape in self.shapes)


def check_streams_blocks_as_it_merges_whole_tensors(case: Case) -> None:
    """However many blocks of the grid it gets at once, values and figures are the same to the last bit."""
    sources = case.sources(case.large(3 * BLOCK_ELEMENTS + 1234))
    num_blocks = -(-sources[0].numel() // case.kernel.grid(case.site(tuple(sources[0].shape))))
    whole = Engine(sources, cuts=[num_blocks])
    merged = whole.run(case.kernel)[0]
    for cuts in ([], [1, num_blocks], [num_blocks - 1, num_blocks]) if num_blocks > 1 else ([],):
        engine = Engine(sources, cuts=cuts)
        assert case.is_same(engine.run(case.kernel)[0], merged, sources), cuts
        assert engine.figures == whole.figures, cuts


def check_fills_tensors_of_any_size(case: Case) -> None:
    """To the last element, and takes tensors without any."""
    for shape in case.shapes:
        assert run_kernel(case.kernel, case.sources(shape)).isfinite().all(), shape
    if case.takes_whole():
        return
    for num_elements in (1, 2, 2**14 + 33, BLOCK_ELEMENTS - 1, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 1):
        assert run_kernel(case.kernel, case.sources((num_elements,))).isfinite().all(), num_elements
    for shape in ((), (0,), (3, 0, 5)):
        merged = run_kernel(case.kernel, [tensor.reshape(shape) for tensor in case.make_sources(0 if shape else 1)])
        assert merged.shape == shape
        assert merged.isfinite().all()


def check_looks_at_elements_only(case: Case) -> None:
    """A kernel that takes neither the whole tensor nor rows gives the same values in any shape."""
    if case.takes_whole() or case.looks_at_rows():
        return
    flat = run_kernel(case.kernel, case.sources()).reshape(-1)
    for shape in case.shapes[1:]:
        assert torch.equal(run_kernel(case.kernel, case.sources(shape)).reshape(-1), flat), shape


def check_declares_its_memory(case: Case) -> None:
    """In scratch, which the engine sees to, and state, which runs that share have in common."""
    sources = case.sources()
    expected = Engine(sources, meter=AllocationMeter()).run(case.kernel)[0]  # makes what is made once and kept
    meter = AllocationMeter()
    tracemalloc.start()  # numpy's arrays
    try:
        merged = Engine(sources, meter=meter).run(case.kernel, case.kernel)[1]
        peak = meter.peak_nbytes + tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert case.is_same(merged, expected, sources)
    allowed = case.kernel.state_nbytes(case.site()) + SLACK_NBYTES
    assert peak <= allowed, f"{peak} bytes besides scratch, {allowed} allowed"


def check_is_a_value(case: Case) -> None:
    """Which can be sent to a worker, compared and looked up."""
    kernel = case.kernel
    assert pickle.loads(pickle.dumps(kernel)) == kernel
    assert hash(pickle.loads(pickle.dumps(kernel))) == hash(kernel)
    if case.again is not None:
        assert case.again() == kernel
        assert hash(case.again()) == hash(kernel)


def check_plans_by_shape_alone(case: Case) -> None:
    """So that one plan holds for tensors of other names, and for another seed."""
    one = case.site()
    other = replace(one, name="another", seed=one.seed + 1)
    for ask in (Kernel.grid, Kernel.num_passes, Kernel.num_scratch, Kernel.state_nbytes):
        answers = [getattr(case.kernel, ask.__name__)(site) for site in (one, other)]
        assert answers[0] == answers[1] >= 0, ask
    assert getattr(torch, case.kernel.compute_dtype).itemsize >= 1


def check_shares_what_it_measures(case: Case) -> None:
    """Measured once and combined block by block in turn, siblings give what they give by themselves."""
    kernels = [case.kernel, case.kernel, *case.siblings]
    sources = case.sources(case.large(2 * BLOCK_ELEMENTS + 1234))
    engine = Engine(sources)
    shared = engine.run(*kernels)
    figures = engine.figures
    for merged, kernel, found in zip(shared, kernels, figures, strict=True):
        assert case.is_same(merged, engine.run(kernel)[0], sources), kernel
        assert found == engine.figures[0], kernel


def check_gives_the_same_bits_again(case: Case) -> None:
    """With other numbers of threads, in any order: no state is left behind in the kernel."""
    sources = case.sources()
    once = run_kernel(case.kernel, sources)
    num_threads = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            run_kernel(case.kernel, case.sources(case.shapes[-1]), name="another")
            assert case.is_same(run_kernel(case.kernel, sources), once, sources), threads
    finally:
        torch.set_num_threads(num_threads)


def check_runs_on_other_devices(case: Case) -> None:
    """On the CPU in disguise, which gets the whole tensor at once: the same bits."""
    sources = case.sources(case.large(2 * BLOCK_ELEMENTS + 20_001))
    site = case.site(tuple(sources[0].shape))
    n = site.num_elements
    dtype = getattr(torch, case.kernel.compute_dtype)
    with FakeGpu():
        scratch = [torch.full((n,), 255, dtype=dtype, device=DEVICE) for _ in range(case.kernel.num_scratch(site))]
        block = MemoryBlock(0, n, scratch, [send(source.reshape(-1)) for source in sources])
        run = case.kernel.start(site)
        for index in range(case.kernel.num_passes(site)):
            run.measure(index, block)
            run.end_pass(index)
        out = torch.full((n,), 255, dtype=dtype, device=DEVICE)
        run.combine(block, out)
        merged = out.cpu().reshape(site.shape)
    assert case.is_same(merged, run_kernel(case.kernel, sources), sources)


def check_leaves_its_inputs_alone(case: Case) -> None:
    """The engine compares them with what they were."""
    for sources in (case.sources(), [tensor.bfloat16() for tensor in case.sources()]):
        run_kernel(case.kernel, sources)


def check_loops_give_the_same_bits(case: Case) -> None:
    """Compiled loops round to what torch's blocks give, however windows and results are cut, and tell the same figures.

    Two kernels at once, so that they share what is measured.
    """
    if case.kernel.loop_dtypes != LOOP_DTYPES:
        return
    rows = [(233, 1011), (2, BLOCK_ELEMENTS + 5)] if case.looks_at_rows() else []
    for shape in ((1,), (2**14 + 33,), (BLOCK_ELEMENTS + 106_501,), *rows):
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            sources = [tensor.to(dtype) for tensor in case.sources(shape)]
            if dtype == torch.bfloat16 and len(sources) > 1:
                sources[1] = sources[1].float()
            for source in sources:  # zeros of both signs
                source.view(-1)[::5] *= -1
                source.view(-1)[::7] *= 0
            kernels = [kernel for kernel in (case.kernel, *case.siblings) if kernel.loop_dtypes == LOOP_DTYPES]
            blocks, loops = Engine(sources), LoopEngine(sources, NAME)
            merged = blocks.run(*kernels)
            for blocks_in_window, cuts in ((1, ()), (2, (7777, BLOCK_ELEMENTS, BLOCK_ELEMENTS + 77_777))):
                rounded = loops.run(kernels, dtype, window_blocks=blocks_in_window, cuts=cuts)
                for one, other in zip(rounded, merged, strict=True):
                    assert _are_same_bits(one, other.to(dtype)), (shape, dtype, cuts)
                assert loops.figures == blocks.figures
                for norm, values in zip(loops.norms, merged, strict=True):
                    assert norm == pytest.approx(values.double().norm().item(), rel=1e-5)
                forked = loops.run(kernels, dtype, window_blocks=blocks_in_window, cuts=cuts, is_forked=True)
                assert all(map(_are_same_bits, forked, rounded))


def _are_same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether tensors are equal; 0.0 and -0.0 are not."""
    return torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def check_loops_keep_what_is_not_finite(case: Case) -> None:
    """Where torch's blocks give NaN or infinity, loops do, few as they are or many, and elsewhere the same values."""
    if case.kernel.loop_dtypes != LOOP_DTYPES:
        return
    for num_odd in (3, 3000):
        sources = [tensor.clone() for tensor in case.sources((4096,))]
        sources[-1][:num_odd] = torch.nan
        sources[0][3500:3510] = torch.inf
        merged = Engine(sources).run(case.kernel)[0]
        (looped,) = LoopEngine(sources, NAME).run([case.kernel], torch.float32)
        assert torch.equal(looped.isnan(), merged.isnan())
        assert torch.equal(looped[~looped.isnan()], merged[~merged.isnan()])


CHECKS: Sequence[Callable[[Case], None]] = (
    check_streams_blocks_as_it_merges_whole_tensors,
    check_fills_tensors_of_any_size,
    check_looks_at_elements_only,
    check_declares_its_memory,
    check_is_a_value,
    check_plans_by_shape_alone,
    check_shares_what_it_measures,
    check_gives_the_same_bits_again,
    check_runs_on_other_devices,
    check_leaves_its_inputs_alone,
    check_loops_give_the_same_bits,
    check_loops_keep_what_is_not_finite,
)


def assert_close(merged: torch.Tensor, exact: Exact) -> None:
    """Assert that float32 values are exact to one part in 10^6 of the terms, wherever no election is close."""
    assert exact.is_draw.double().mean() < 0.05
    error = (merged.double() - exact.values).abs()
    assert (error <= 1e-6 * exact.terms)[~exact.is_draw].all(), (error / exact.terms)[~exact.is_draw].max()


def assert_rounded_once(merged: torch.Tensor, exact: Exact) -> None:
    """Assert the same of values in bfloat16, which are off by half a unit in the last place besides."""
    nearest = exact.values.to(torch.bfloat16)
    ulp = (nearest.abs().view(torch.int16) + 1).view(torch.bfloat16).double() - nearest.abs().double()
    error = (merged.double() - exact.values).abs()
    assert (error <= ulp / 2 + 1e-6 * exact.terms)[~exact.is_draw].all(), (error / (ulp / 2)).max()
