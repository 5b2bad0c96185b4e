"""Random numbers in place of stored ones: the same for a seed, a name and an element, on every machine and device."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import TYPE_CHECKING

from raymerge.ops.decoders.decoder import Decoder, Raw
from raymerge.ops.kernels.sparsifiers.random import RandomBits
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NUM_BITS = 16
"""Bits that choose a normal number: as many differ as a 16-bit float has."""


def draw_normal(seed: int, name: str, num_elements: int) -> NDArray[np.float32]:
    """Return numbers from a normal distribution of mean 0 and variance 1, the first ones of a tensor."""
    found: NDArray[np.float32] = _quantiles()[RandomBits(seed, name, 0).draw(0, num_elements) >> (32 - _NUM_BITS)]
    return found


def draw_uniform(seed: int, name: str, num_elements: int) -> NDArray[np.float32]:
    """Return numbers that are evenly distributed between -1 and 1, the first ones of a tensor."""
    words = RandomBits(seed, name, 0).draw(0, num_elements).view(np.int32)
    return words.astype(np.float32) * np.float32(2.0**-31)


@dataclass(frozen=True, slots=True)
class Noise(Decoder):
    """The numbers of `draw_normal`, a block at a time."""

    seed: int
    name: str
    """The tensor's, so that no two have the same numbers."""

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return what the bits and the places in the table take: two words and one long word for each."""
        return (4 + 4 + 8) * num_elements + 4 * (1 << _NUM_BITS)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Draw elements [start, stop)."""
        RandomBits(self.seed, self.name, 0).write(start, (out, torch.empty_like(out)))
        places = out.view(torch.int32)[: out.numel()].long()
        places.bitwise_right_shift_(32 - _NUM_BITS).bitwise_and_((1 << _NUM_BITS) - 1)
        return out.copy_(_table(out.device)[places])


@cache
def _quantiles() -> NDArray[np.float32]:
    """Return the normal distribution's quantile in the middle of each of equal shares; shared, never written to."""
    normal, half = NormalDist(), 2 ** (_NUM_BITS - 1)
    upper = np.array([normal.inv_cdf(0.5 + (k + 0.5) / (2 * half)) for k in range(half)], np.float32)
    return np.concatenate([-upper[::-1], upper])


@cache
def _table(device: torch.device) -> torch.Tensor:
    """Return the quantiles on a device."""
    return torch.from_numpy(_quantiles()).to(device)
