"""RAM and RAM+ where tests/ops/test_kernel.py does not look: counts, and elements that one model alone changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymerge.ops.kernel import Site
from raymerge.ops.registry import find_op
from tests.ops.engine import Engine, run_kernel
from tests.ops.kernel_contract import assert_close
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact

N = 150_001


@pytest.fixture
def tensors() -> list[torch.Tensor]:
    """A base, and models that each changed other thirds of it."""
    base, *models = make_fine_tunes(N, 3, dtype=torch.float32)
    changed = [torch.arange(N) % 12 < 6, torch.arange(N) % 12 > 8, torch.arange(N) % 12 > 4]
    return [base, *(torch.where(mask, model, base) for model, mask in zip(models, changed, strict=True))]


@pytest.mark.parametrize("op", ["ram", "ramplus_tl"])
@pytest.mark.parametrize("settings", [{}, {"epsilon": 0.0004}])
def test_equals_its_formula(tensors: list[torch.Tensor], op: str, settings: dict[str, Any]) -> None:
    if op == "ramplus_tl":
        settings = settings | {"r": 0.7, "alpha": 5.0}
    assert_close(run_kernel(find_op(op).kernel(settings), tensors), find_exact(op, tensors, settings))


def test_counts_exactly(tensors: list[torch.Tensor]) -> None:
    engine = Engine(tensors)
    engine.run(find_op("ramplus_tl").kernel({"epsilon": 0.0}))
    changed = torch.stack([tensor != tensors[0] for tensor in tensors[1:]])
    is_unique = changed.sum(0) == 1
    expected = {f"changed[{k}]": mask.sum().item() / N for k, mask in enumerate(changed)}
    expected |= {f"unique[{k}]": (mask & is_unique).sum().item() / N for k, mask in enumerate(changed)}
    assert engine.figures == [expected]


def test_strengthens_what_one_model_alone_changed() -> None:
    base, first, second = torch.zeros(4), torch.tensor([1.0, 0, 1, 2]), torch.tensor([0, 0, 1.0, 4])
    kernel = find_op("ramplus_tl").kernel({"r": 0.5, "alpha": 0.8})
    assert run_kernel(kernel, [base, first, second]).tolist() == pytest.approx([1.4, 0, 1, 3])


def test_nothing_is_counted_where_nothing_grows() -> None:
    site = Site("w", (300, 500), 3, 0)
    assert find_op("ramplus_tl").kernel({"r": 0.0}).num_passes(site) == 0
    assert find_op("ramplus_tl").kernel({}).num_passes(site) == 1
