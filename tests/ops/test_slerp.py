"""Slerp at its edges; tests/ops/test_kernel.py compares it with its formula."""

from __future__ import annotations

import math

import pytest
import torch

from raymerge.ops.registry import find_op
from raymerge.ops.slerp import slerp_coefficients
from tests.ops.engine import Engine, run_kernel
from tests.ops.kernel_contract import assert_close
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

ZEROS = torch.zeros(1000)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.2])
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_follows_the_arc_or_the_chord(t: float, noise: float) -> None:
    a, b = make_fine_tunes(150_001, 1, dtype=torch.float32)
    b += noise * torch.randn(len(b), generator=torch.Generator().manual_seed(3))
    engine = Engine([a, b])
    merged = engine.run(find_op("slerp").kernel({"t": t}))[0]
    assert_close(merged, find_exact("slerp", [a, b], {"t": t}))
    x, y = a.double(), b.double()
    cosine = engine.figures[0]["cosine"]
    assert cosine == pytest.approx((x @ y / (x.norm() * y.norm())).item(), rel=1e-7)
    assert (cosine < 0.9) == (noise > 0)
    assert engine.figures[0]["norm[0]"] == pytest.approx(x.norm().item(), rel=1e-7)
    assert engine.figures[0]["norm[1]"] == pytest.approx(y.norm().item(), rel=1e-7)


def test_special_vectors() -> None:
    v = torch.randn(1000)
    slerp = find_op("slerp").kernel({"t": 0.5})
    torch.testing.assert_close(run_kernel(slerp, [ZEROS, v]), v * math.sqrt(0.5))
    torch.testing.assert_close(run_kernel(slerp, [v, ZEROS]), v * math.sqrt(0.5))
    assert torch.equal(run_kernel(slerp, [v, -v]), ZEROS)


def test_coefficients() -> None:
    assert slerp_coefficients(0.25, 4.0, 9.0, -6.0) == (0.75, 0.25)
    assert slerp_coefficients(0.25, 1e-18, 1e-18, 1e-18) == slerp_coefficients(0.25, 1.0, 1.0, 1e-18)
