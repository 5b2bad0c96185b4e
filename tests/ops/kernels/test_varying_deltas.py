"""SCE's selection and weights at their edges; tests/ops/test_kernel.py compares it with its formula."""

from __future__ import annotations

import pytest
import torch

from raymerge.ops.kernels import varying_deltas
from raymerge.ops.registry import find_op
from tests.ops.engine import NAME, Engine, run_kernel
from tests.ops.kernel_contract import assert_close
from tests.ops.loop_engine import LoopEngine
from tests.ops.samples import make_fine_tunes
from tests.references import find_exact


@pytest.mark.parametrize("size", [0.05, 1.0])
@pytest.mark.parametrize("num_models", [2, 3, 8])
def test_weighs_models_by_their_mean_squares(num_models: int, size: float) -> None:
    base, *models = make_fine_tunes(70_001, num_models, dtype=torch.float32)
    tensors = [base, *(base + (x - base) * (1 + k) * size for k, x in enumerate(models))]
    engine = Engine(tensors)
    merged = engine.run(find_op("sce").kernel({"select_topk": 0.4}))[0]
    assert_close(merged, find_exact("sce", tensors, {"select_topk": 0.4}))
    weights = [engine.figures[0][f"weight[{k}]"] for k in range(num_models)]
    assert sum(weights) == pytest.approx(1)
    assert (weights[0] == weights[1]) == (size == 0.05), "even weights below mean squares of 1e-6"


def test_counts_elements_that_vary_and_takes_the_first_of_equals() -> None:
    base = torch.zeros(8)
    first = torch.tensor([1.0, 2, 2, 0, 2, 2, 5, 2])
    second = torch.tensor([1.0, 4, 0, 0, 0, 4, 5, 0])
    merged = run_kernel(find_op("sce").kernel({"select_topk": 0.5}), [base, first, second])
    assert (merged != 0).tolist() == [False, True, True, False, False, False, False, False]


def test_equal_variances_of_few_bits_are_equal() -> None:
    """Whatever the models' order: the selection depends on the index alone."""
    deltas = torch.tensor([[0.0, 1, 3], [1, 3, 0], [3, 0, 1], [0, 2, 3], [2, 3, 0]]) * 2**-9
    tensors = [torch.zeros(5), *deltas.t().contiguous()]
    for share, num_kept in ((0.21, 1), (0.41, 2), (0.8, 4)):
        merged = run_kernel(find_op("sce").kernel({"select_topk": share}), tensors)
        assert (merged != 0).tolist() == [k < num_kept for k in range(5)]


def test_what_is_not_remembered_is_selected_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same of equal variances, wherever pieces are cut and in whatever order they are merged."""
    base, *models = make_fine_tunes(300_001, 3, dtype=torch.float32)
    tensors = [base, *(base + (x - base).mul(1000).round().div(1024) for x in models)]
    kernel = find_op("sce").kernel({"select_topk": 0.3})
    (remembered,) = LoopEngine(tensors, NAME).run([kernel], torch.float32)
    monkeypatch.setattr(varying_deltas, "MOST_REMEMBERED", 0)
    for is_forked in (False, True):
        (again,) = LoopEngine(tensors, NAME).run([kernel], torch.float32, cuts=(777, 200_001), is_forked=is_forked)
        assert torch.equal(again, remembered)


@pytest.mark.parametrize("share", [-1.0, 0.0, 1e-9])
def test_a_share_of_nothing_leaves_the_base(share: float) -> None:
    tensors = make_fine_tunes(1000, 2, dtype=torch.float32)
    assert torch.equal(run_kernel(find_op("sce").kernel({"select_topk": share}), tensors), tensors[0])


def test_one_model_alone_does_not_vary() -> None:
    tensors = make_fine_tunes(1000, 1, dtype=torch.float32)
    assert torch.equal(run_kernel(find_op("sce").kernel({"select_topk": 0.9}), tensors), tensors[0])
    torch.testing.assert_close(run_kernel(find_op("sce").kernel({}), tensors), tensors[1])
