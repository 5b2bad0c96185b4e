"""Random numbers in place of stored ones."""

from __future__ import annotations

from hashlib import sha256

import numpy as np
import torch

from raymerge.ops.decoders.decoder import Raw
from raymerge.ops.decoders.noise import Noise, draw_normal, draw_uniform


def test_are_normal() -> None:
    values = draw_normal(0, "a", 10**6).astype(np.float64)
    moments = [float(np.mean(values**k)) for k in range(1, 5)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.02)
    assert 4 < values.max() < 4.5


def test_are_uniform() -> None:
    values = draw_uniform(0, "a", 10**6).astype(np.float64)
    assert np.allclose([values.mean(), np.square(values).mean()], [0, 1 / 3], atol=0.003)
    assert -1 <= values.min() < -0.999
    assert 0.999 < values.max() <= 1


def test_are_the_same_everywhere() -> None:
    digests = [sha256(draw(3, "a", 70_000).tobytes()).hexdigest()[:16] for draw in (draw_normal, draw_uniform)]
    assert digests == ["f01849ea58ff472d", "1bb98a957a173524"]
    assert not np.array_equal(draw_normal(3, "a", 99), draw_normal(4, "a", 99))
    assert not np.array_equal(draw_normal(3, "a", 99), draw_normal(3, "b", 99))


def test_a_block_has_the_numbers_of_the_whole() -> None:
    expected = torch.from_numpy(draw_normal(1, "a", 200_000).copy())
    noise = Noise(1, "a")
    for start, stop in ((0, 200_000), (65_000, 140_001), (7, 8)):
        out = torch.empty(stop - start)
        assert noise.decode(Raw((), start, stop), start, stop, out) is out
        assert torch.equal(out, expected[start:stop])
