"""The random masks: always the same ones, and as good as random."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from raymerge.ops.kernels.sparsifiers.random import PAGE_ELEMENTS, RandomBits, RandomSparsifier
from tests.fake_gpu import DEVICE, FakeGpu

NUM_ELEMENTS = 2**20
Bits = NDArray[np.uint32]


def draw(
    *,
    seed: int = 0,
    name: str = "w",
    position: int = 0,
    start: int = 0,
    num_elements: int = NUM_ELEMENTS,
    dtype: torch.dtype = torch.float32,
) -> Bits:
    spares = (torch.full((num_elements,), torch.nan, dtype=dtype), torch.full((num_elements,), torch.nan, dtype=dtype))
    RandomBits(seed, name, position).write(start, spares)
    return spares[0].view(torch.int32)[:num_elements].numpy().view(np.uint32).copy()


def signs(bits: Bits) -> NDArray[np.float32]:
    """Return what a mask of density one half drops and keeps, as -1 and 1."""
    return np.where(bits < 2**31, np.float32(1), np.float32(-1))


def excess(counts: NDArray[np.int64]) -> float:
    """Return by how many standard deviations chi-square exceeds what equal chances give."""
    expected = counts.sum() / counts.size
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    return (chi_square - counts.size + 1) / float(np.sqrt(2 * counts.size - 2))


def test_bits_are_what_they_always_were() -> None:
    """A change here changes every merge with a random method: never without a note in the changelog."""
    assert draw(num_elements=4).tolist() == [3895877102, 2112060380, 1901212235, 3071687692]
    across_pages = draw(seed=42, name="model.norm.weight", position=2, start=2**40 + 65_534, num_elements=4)
    assert across_pages.tolist() == [1834014398, 283685822, 3137915706, 689526751]
    keep = torch.ones(32)
    RandomSparsifier(0.3, seed=1, name="w", position=0).trim(0, keep, (torch.empty(32), torch.empty(32)))
    assert "".join(str(int(x)) for x in keep.tolist()) == "00100111011100101001010000000000"


def test_any_cut_gives_the_same_bits() -> None:
    whole = draw(start=1000, num_elements=200_000)
    cuts = [1000, 1001, 65_535, 65_537, 131_072, 180_000, 201_000]
    pieces = [draw(start=a, num_elements=b - a) for a, b in pairwise(cuts)]
    assert np.array_equal(np.concatenate(pieces), whole)
    assert np.array_equal(draw(dtype=torch.float64), draw())


@pytest.mark.parametrize("start", [0, 3 * PAGE_ELEMENTS, 1000])
@pytest.mark.parametrize("num_elements", [10, PAGE_ELEMENTS, 3 * PAGE_ELEMENTS + 5])
def test_devices_agree(start: int, num_elements: int) -> None:
    with FakeGpu():
        spares = torch.empty(num_elements, device=DEVICE), torch.empty(num_elements, device=DEVICE)
        RandomBits(3, "w", 1).write(start, spares)
        there = spares[0].view(torch.int32).cpu()
    here = torch.empty(num_elements), torch.empty(num_elements)
    RandomBits(3, "w", 1).write(start, here)
    assert torch.equal(there, here[0].view(torch.int32))


@pytest.mark.parametrize("density", [0.001, 0.1, 0.5, 0.9, 0.999])
def test_keeps_the_share_that_it_should(density: float) -> None:
    deviation = np.sqrt(density * (1 - density) / NUM_ELEMENTS)
    for position in range(4):
        keep = torch.ones(NUM_ELEMENTS)
        spares = (torch.empty(NUM_ELEMENTS), torch.empty(NUM_ELEMENTS))
        RandomSparsifier(density, seed=5, name="w", position=position).trim(0, keep, spares)
        assert abs(keep.mean().item() - density) < 4 * deviation


def test_share_is_right_in_every_page() -> None:
    shares = signs(draw(num_elements=2**22)).reshape(-1, PAGE_ELEMENTS).mean(1) * np.sqrt(PAGE_ELEMENTS)
    assert abs(shares.std() - 1) < 0.3
    assert np.abs(shares).max() < 4


def test_bits_and_neighbours_are_uniform() -> None:
    bits = draw(num_elements=2**22)
    top, high = bits >> 24, bits >> 16
    assert abs(excess(np.bincount(high, minlength=2**16))) < 4.5
    for distance in (1, 2, 64, 4096, PAGE_ELEMENTS):
        pairs = top[:-distance] << 8 | top[distance:]
        assert abs(excess(np.bincount(pairs, minlength=2**16))) < 4.5
    ones = np.array([(bits >> bit & 1).mean() for bit in range(16, 32)])
    assert np.abs(ones - 0.5).max() < 4.5 * 0.5 / np.sqrt(bits.size)


@pytest.mark.parametrize("start", [0, 2**31 - 2**19, 2**32 - 2**19, 2**40])
def test_has_no_period_and_no_lattice(start: int) -> None:
    """Neither the spectrum of a mask nor its correlation with itself, at whatever distance, stands out."""
    spectrum = np.fft.rfft(signs(draw(start=start)))
    power = (np.abs(spectrum) ** 2 / NUM_ELEMENTS)[1:-1]
    assert power.max() < np.log(power.size) + 8
    correlation = np.fft.irfft(np.abs(spectrum) ** 2)[1 : NUM_ELEMENTS // 2] / np.sqrt(NUM_ELEMENTS)
    assert np.abs(correlation).max() < 6.5
    assert abs(correlation.std() - 1) < 0.01


@pytest.mark.parametrize(
    "other",
    [{"position": 1}, {"name": "x"}, {"seed": 1}, {"seed": 2**64}, {"start": 2**32}, {"name": "w.1"}],
    ids=str,
)
def test_masks_are_independent(other: dict[str, int]) -> None:
    """Masks of other models, tensors, seeds and places have nothing in common, at whatever distance."""
    one, another = (np.fft.rfft(signs(bits)) for bits in (draw(), draw(**other)))  # type: ignore[arg-type]
    correlation = np.fft.irfft(one * np.conj(another)) / np.sqrt(NUM_ELEMENTS)
    assert np.abs(correlation).max() < 6.5
    assert abs(correlation.std() - 1) < 0.01


def test_pages_are_independent_of_each_other() -> None:
    """All pairs of 64 pages: their correlations spread as those of random pages do."""
    pages = signs(draw(num_elements=64 * PAGE_ELEMENTS)).reshape(64, PAGE_ELEMENTS)
    correlation = (pages @ pages.T)[np.triu_indices(64, 1)] / np.sqrt(PAGE_ELEMENTS)
    assert abs(correlation.std() - 1) < 0.06
    assert np.abs(correlation).max() < 5
