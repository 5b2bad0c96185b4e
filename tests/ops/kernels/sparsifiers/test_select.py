"""Selection by magnitude, against a stable sort."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from raymerge.ops.errors import OpParameterError
from raymerge.ops.kernels.sparsifiers.select import MagnitudeSparsifier
from raymerge.ops.registry import find_op
from tests.ops.engine import run_kernel


def keep_largest(values: torch.Tensor, num_kept: int) -> torch.Tensor:
    """Return the values with all but the largest set to zero; of equal ones, those of lowest index are kept."""
    order = values.abs().sort(descending=True, stable=True).indices
    kept = torch.zeros_like(values)
    kept[order[:num_kept]] = values[order[:num_kept]]
    return kept


def keep_inner(values: torch.Tensor, num_kept: int, num_outliers: int) -> torch.Tensor:
    """Return the values of the ranks below the largest; of equal ones at either end, those of lowest index are kept."""
    sizes = values.abs()
    ranked = sizes.sort(descending=True).values[num_outliers : num_outliers + num_kept]
    high, low = ranked[0], ranked[-1]
    is_kept = (low < sizes) & (sizes < high)
    for end in (low, high):
        is_kept[(sizes == end).nonzero()[: int((ranked == end).sum()), 0]] = True
    return torch.where(is_kept, values, 0)


def select_in_blocks(values: torch.Tensor, num_kept: int, cuts: Sequence[int], num_outliers: int = 0) -> torch.Tensor:
    sparsifier = MagnitudeSparsifier(num_kept, num_outliers)
    bounds = [0, *sorted(set(cuts) - {0, values.numel()}), values.numel()]
    blocks = list(pairwise(bounds))

    def spares(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.full((stop - start,), torch.nan), torch.full((stop - start,), torch.nan)

    for index in range(sparsifier.num_passes):
        for start, stop in blocks:
            sparsifier.measure(index, values[start:stop].clone(), spares(start, stop))
        sparsifier.end_pass(index)
    for _ in range(2):  # trimming may be repeated
        trimmed = values.clone()
        for start, stop in blocks:
            sparsifier.trim(start, trimmed[start:stop], spares(start, stop))
    return trimmed


FEW_VALUES = st.sampled_from([0.0, -0.0, 0.25, -0.25, 0.5, -0.5, 1.0, 1.5, -3.0, 1e-45, -2e-45, 1e-38, 3e38])
ANY_FLOAT = st.floats(width=32, allow_nan=False, allow_infinity=False)


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_keeps_the_largest_and_of_equals_the_first(data: st.DataObject) -> None:
    values = torch.tensor(data.draw(st.lists(FEW_VALUES | ANY_FLOAT, min_size=1, max_size=60)), dtype=torch.float32)
    num_kept = data.draw(st.integers(1, values.numel()))
    cuts = data.draw(st.lists(st.integers(0, values.numel()), max_size=4))
    assert torch.equal(select_in_blocks(values, num_kept, cuts), keep_largest(values, num_kept))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_keeps_what_lies_below_the_outliers(data: st.DataObject) -> None:
    values = torch.tensor(data.draw(st.lists(FEW_VALUES | ANY_FLOAT, min_size=2, max_size=60)), dtype=torch.float32)
    num_kept = data.draw(st.integers(1, values.numel() - 1))
    num_outliers = data.draw(st.integers(1, values.numel() - num_kept))
    cuts = data.draw(st.lists(st.integers(0, values.numel()), max_size=4))
    kept = select_in_blocks(values, num_kept, cuts, num_outliers)
    assert torch.equal(kept, keep_inner(values, num_kept, num_outliers))


@pytest.mark.parametrize(("density", "gamma", "num_elements"), [(0.5, 0.01, 99), (0.9, 0.0, 1000), (1e-9, 0.3, 50)])
def test_breadcrumbs_without_outliers_and_of_one_element(density: float, gamma: float, num_elements: int) -> None:
    """With too few elements for an outlier all but the smallest are kept, and one at least."""
    model = torch.randn(num_elements, generator=torch.Generator().manual_seed(3))
    kernel = find_op("breadcrumbs").kernel({"weight": (1.0,), "density": (density,), "gamma": (gamma,)})
    merged = run_kernel(kernel, [torch.zeros(num_elements), model])
    expected = keep_inner(model, max(1, int(density * num_elements)), int(gamma * num_elements))
    assert torch.equal(merged, expected)
    assert merged.any()


def test_more_kept_than_outliers_leave_takes_from_the_outliers() -> None:
    model = torch.randn(1000, generator=torch.Generator().manual_seed(4))
    kernel = find_op("breadcrumbs").kernel({"weight": (1.0,), "density": (0.95,), "gamma": (0.2,)})
    assert torch.equal(run_kernel(kernel, [torch.zeros(1000), model]), keep_inner(model, 950, 50))


def test_refuses_a_share_of_outliers_that_is_none() -> None:
    with pytest.raises(OpParameterError, match=r"gamma = -0\.1 is outside of 0 to 1"):
        find_op("breadcrumbs").kernel({"weight": (1.0,), "gamma": (-0.1,)})


@pytest.mark.parametrize("density", [1e-9, 0.01, 0.2, 0.5, 0.75, 0.999])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_ties_keeps_what_a_stable_sort_keeps(density: float, dtype: torch.dtype) -> None:
    num_elements = 200_000
    model = (torch.randn(num_elements, generator=torch.Generator().manual_seed(1)) * 0.001).to(dtype)
    kernel = find_op("ties").kernel({"weight": (1.0,), "density": (density,), "normalize": False})
    merged = run_kernel(kernel, [torch.zeros(num_elements, dtype=dtype), model])
    assert torch.equal(merged, keep_largest(model.float(), max(1, int(density * num_elements))))


@pytest.mark.parametrize("num_kept", [1, 65_535, 65_536, 65_537, 100_000, 131_072, 150_000, 199_999, 200_000])
def test_the_quota_of_equals_ends_anywhere(num_kept: int) -> None:
    values = torch.full((200_000,), 0.5)
    values[::2] = -0.5
    cuts = range(65_536, 200_000, 65_536)
    assert torch.equal(select_in_blocks(values, num_kept, cuts), keep_largest(values, num_kept))


def test_selects_in_any_number_of_values_in_the_bin() -> None:
    """All values share their high bits, so that all of them are counted by their low ones."""
    random = torch.Generator().manual_seed(2)
    bits = torch.randint(0x3F800000, 0x3F810000, (300_000,), generator=random, dtype=torch.int32)
    values = bits.view(torch.float32)
    cuts = range(65_536, 300_000, 65_536)
    for num_kept in (1, 123_456, 299_999):
        assert torch.equal(select_in_blocks(values, num_kept, cuts), keep_largest(values, num_kept))
    assert torch.equal(select_in_blocks(values, 123_456, cuts, 1000), keep_inner(values, 123_456, 1000))


def test_refuses_float64() -> None:
    block = torch.ones(3, dtype=torch.float64)
    with pytest.raises(TypeError, match="float32"):
        MagnitudeSparsifier(1).measure(0, block, (block.clone(), block.clone()))
