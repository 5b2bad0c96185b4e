"""Worked examples, computed with mergekit 0.1.5 in float32, to six significant digits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from raymerge.ops.registry import find_op
from tests.ops.engine import run_kernel

B = torch.tensor([[1, -2, 3, 0.5], [0, 0.25, -1, 2]])
M1 = B + torch.tensor([[0.4, -0.1, 0.02, 0], [0.3, -0.6, 0.05, 0.2]])
M2 = B + torch.tensor([[-0.2, -0.3, 0.5, 0.1], [0.3, 0.6, 0.01, -0.2]])
M3 = B + torch.tensor([[0.1, 0, -0.4, 0.2], [-0.05, 0.9, 0, 0.25]])
Z = torch.tensor([[-1, 2, 0.5, 3], [2, 0.1, 1, -0.5]])

MODELS = [M1, M2, M3]
WITH_BASE = [B, *MODELS]
WEIGHTS = {"weight": (1.0, 0.5, 0.5)}
INNER = {"density": (0.5, 0.5, 0.75), "gamma": (0.13, 0.13, 0.13)}
HALF = {"density": (0.5, 0.5, 0.5)}


@pytest.mark.parametrize(
    ("op", "parameters", "tensors", "expected"),
    [
        (
            "linear",
            {"weight": (1.0, 2.0, -0.5)},
            MODELS,
            [0.98, -2.28, 3.488, 0.54, 0.37, 0.31, -0.972, 1.87],
        ),
        (
            "linear",
            {"weight": (0.3, 0.3, 0.3), "normalize": False},
            MODELS,
            [0.99, -1.92, 2.736, 0.54, 0.165, 0.495, -0.882, 1.875],
        ),
        (
            "slerp",
            {"t": 0.25},
            [B, M1],
            [1.10319, -2.03058, 3.01322, 0.501367, 0.0753418, 0.0999997, -0.990176, 2.05569],
        ),
        (
            "slerp",
            {"t": 0.25},
            [B, Z],
            [0.553753, -1.10751, 3.19809, 1.81371, 0.878189, 0.292121, -0.553753, 1.76615],
        ),
        (
            "nuslerp",
            {"weight": (1.0, 3.0)},
            [M1, Z],
            [-0.378544, 1.06292, 1.81453, 3.18905, 2.11147, -0.053894, 0.575148, 0.466074],
        ),
        (
            "nuslerp",
            {"weight": (1.0, 3.0), "nuslerp_flatten": False},
            [M1, Z],
            [-0.380076, 1.06039, 1.78561, 3.15614, 2.17461, -0.0592793, 0.580973, 0.503532],
        ),
        (
            "nuslerp",
            {"weight": (1.0, 3.0), "nuslerp_flatten": False, "nuslerp_row_wise": True},
            [M1, Z],
            [-0.375005, 0.777936, 1.49879, 2.90831, 2.15938, -1.42437, 0.550357, 0.359658],
        ),
        (
            "nuslerp",
            {"weight": (1.0, 1.0)},
            [B, M1, M2],
            [1.19202, -2.38404, 3.49925, 0.596009, 0.576055, 0.25, -0.942394, 2],
        ),
        (
            "multislerp",
            {"weight": (1.0, 1.0, 2.0)},
            MODELS,
            [1.12098, -2.12989, 2.96438, 0.63715, 0.121255, 0.720152, -1.00134, 2.16579],
        ),
        (
            "multislerp",
            {"weight": (1.0, 1.0, 2.0)},
            WITH_BASE,
            [1.22597, -2.21275, 2.89882, 0.735822, 0.284678, 1.03383, -0.965358, 2.24633],
        ),
        (
            "karcher",
            {},
            [M1, M2, Z],
            [0.430352, -0.843747, 3.28849, 2.27219, 1.45426, 0.274419, -0.302978, 1.55063],
        ),
        (
            "model_stock",
            {},
            WITH_BASE,
            [0.856312, -1.80842, 2.94252, 0.356313, -0.263427, -0.181062, -1.02874, 1.88026],
        ),
        (
            "model_stock",
            {"filter_wise": True},
            WITH_BASE,
            [0.873974, -1.83197, 2.94959, 0.373974, -0.22433, -0.117086, -1.02447, 1.89803],
        ),
        ("task_arithmetic", WEIGHTS, WITH_BASE, [1.35, -2.25, 3.07, 0.65, 0.425, 0.4, -0.945, 2.225]),
        (
            "task_arithmetic",
            WEIGHTS | {"normalize": True},
            WITH_BASE,
            [1.175, -2.125, 3.035, 0.575, 0.2125, 0.325, -0.9725, 2.1125],
        ),
        ("ties", WEIGHTS | {"density": (0.5, 0.5, 0.75)}, WITH_BASE, [1.3, -2.3, 3.5, 0.7, 0.3, 1, -1, 2.21667]),
        (
            "ties",
            WEIGHTS | {"lambda": 0.5},
            WITH_BASE,
            [1.15, -2.08333, 3.09, 0.575, 0.15, 0.625, -0.981667, 2.10833],
        ),
        (
            "ties",
            WEIGHTS | HALF | {"rescale": True},
            WITH_BASE,
            [1.44533, -2.39, 3.65, 0.717143, 0.352667, 1.12857, -1, 2.23892],
        ),
        (
            "breadcrumbs",
            WEIGHTS | INNER,
            WITH_BASE,
            [1.45, -2.25, 3.05, 0.6, 0.425, 0.25, -1, 2.225],
        ),
        (
            "breadcrumbs_ties",
            WEIGHTS | INNER,
            WITH_BASE,
            [1.45, -2.25, 3.25, 0.6, 0.45, 0.25, -1, 2.325],
        ),
        ("dare_ties", WEIGHTS, WITH_BASE, [1.45, -2.25, 3.27, 0.65, 0.45, 1, -0.945, 2.325]),
        ("dare_linear", WEIGHTS, WITH_BASE, [1.35, -2.25, 3.07, 0.65, 0.425, 0.4, -0.945, 2.225]),
        ("nearswap", {"t": 0.1}, [B, M1], [1.1, -2.1, 3.02, 0.5, 0.1, 0.15, -0.95, 2.1]),
        ("ram", {}, WITH_BASE, [1.1, -2.2, 3.04, 0.65, 0.183333, 0.55, -0.97, 2.08333]),
        ("ramplus_tl", {}, WITH_BASE, [1.1, -2.2, 3.04, 0.65, 0.183333, 0.55, -0.97, 2.08333]),
        (
            "sce",
            {},
            WITH_BASE,
            [1.21378, -2.21408, 3.29378, 0.655213, 0.3, 1.01564, -0.972815, 2.23104],
        ),
        ("sce", {"select_topk": 0.5}, WITH_BASE, [1.20488, -2, 3.28488, 0.5, 0, 1.03052, -1, 2.23252]),
        ("arcee_fusion", {}, [B, M1], [1, -2, 3, 0.5, 0, -0.35, -1, 2]),
        ("passthrough", {"scale": (2.0,)}, [M1], [2.8, -4.2, 6.04, 1, 0.6, -0.7, -1.9, 4.4]),
    ],
)
def test_agrees_with_mergekit(
    op: str, parameters: dict[str, Any], tensors: list[torch.Tensor], expected: list[float]
) -> None:
    merged = run_kernel(find_op(op).kernel(parameters), tensors).float()
    torch.testing.assert_close(merged, torch.tensor(expected).reshape(2, 4), rtol=5e-6, atol=1e-7)


ONES = torch.ones(4)
DELTAS = [[3.0, -1.0, 2.0, 0.5], [-2.0, -1.0, -2.0, 0.25], [-2.0, 0.5, 0.5, 0.0]]
"""Their sum is -1, -1.5, 0.5, 0.75."""


@pytest.mark.parametrize(
    ("op", "parameters", "expected"),
    [
        ("magmax", {"lambda": 1.0}, [4, 0, -1, 1.5]),  # 2 and -2 are equally large: the later one
        ("magmax", {}, [2.5, 0.5, 0, 1.25]),
        ("emr", {}, [-1, 0, 3, 1.5]),  # 3 is larger than -2, but has not the sign of the sum
        ("emr", {"lambda": 0.5}, [0, 0.5, 2, 1.25]),
        # the two largest of each: 3 and 2; -2 and -2; -2 and, of two that are equally large, the first 0.5
        ("localize_and_stitch", {"density": (0.5, 0.5, 0.5)}, [1 - 1 / 3, 1.5, 1, 1]),
        # the first element: 3 >= 0.4 * 4, 2 >= 0.4 * 1 and once more, so that all three need it; in all 3, 2, 3 and 2
        ("consensus", {"k": 2}, [0, -0.5, 1.5, 1.75]),
        ("consensus", {"k": 3}, [0, 1, 1.5, 1]),
        ("consensus", {"k": 3, "lambda": 0.5}, [0.5, 1, 1.25, 1]),
        ("consensus", {"k": 2, "mask_lambda": (0.9, 0.9, 0.9)}, [0, -0.5, 1.5, 1]),  # needed by 2, 2, 2 and 1
        ("consensus", {"k": 0, "mask_lambda": (9.0, 9.0, 9.0)}, [0, -0.5, 1.5, 1.75]),
        ("metagpt", {}, [1.5617977528, 0.2426966292, 1.4539325843, 1.3376404494]),  # squares 14.25, 9.0625 and 4.5
        ("assembly_of_experts", {"weight": (0.5, 0.25, 0.0), "delta": 1.8}, [2, 0.25, 1.5, 1.3125]),
        ("assembly_of_experts", {"weight": (0.5, 0.25, 0.0), "delta": 1.9}, [1, 1, 1, 1]),  # sqrt(14.25 / 4) = 1.887
        ("assembly_of_experts", {"weight": (0.0, 0.5, 0.25), "delta": 1.51}, [1, 1, 1, 1]),  # sqrt(9.0625 / 4) = 1.505
    ],
)
def test_agrees_with_the_definition(op: str, parameters: dict[str, Any], expected: list[float]) -> None:
    """Worked out by hand from the papers' formulas."""
    defaults: dict[str, Any] = {"mask_lambda": (0.4, 0.4, 0.4)} if op == "consensus" else {}
    tensors = [ONES, *(ONES + torch.tensor(delta) for delta in DELTAS)]
    merged = run_kernel(find_op(op).kernel(defaults | parameters), tensors)
    torch.testing.assert_close(merged, torch.tensor(expected).float(), rtol=1e-6, atol=0)


def test_expo_goes_on_from_the_model() -> None:
    merged = run_kernel(find_op("expo").kernel({"alpha": 0.5}), [ONES, ONES + torch.tensor(DELTAS[0])])
    torch.testing.assert_close(merged, torch.tensor([5.5, -0.5, 4, 1.75]), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("points", "weights", "expected"),
    [
        ([[0, 0], [1, 0], [0, 1]], (1, 1, 1), [(3 - 3**0.5) / 6] * 2),  # Fermat's point: sees each side at 120 degrees
        ([[0, 0], [1, 0], [-0.9, 0.1]], (1, 1, 1), [0, 0]),  # a corner of more than 120 degrees is the median itself
        ([[0, 0], [1, 0], [0, 1]], (3, 1, 1), [0, 0]),  # as is one that outweighs the others
        ([[5, 0], [1, 0], [2, 0]], (1, 1, 1), [2, 0]),  # on a line, the one in the middle
        ([[5, 0], [1, 2]], (1, 1), [3, 1]),
        ([[5, 0], [1, 2]], (0, 1), [1, 2]),
        ([[1, 2]] * 3, (1, 2, 3), [1, 2]),
        ([[0, 0], [0, 0], [1, 0], [0, 1]], (0.5, 0.5, 1, 1), [(3 - 3**0.5) / 6] * 2),
        ([[1000, 1000], [1001, 1000], [1000, 1001]], (1, 1, 1), [1000 + (3 - 3**0.5) / 6] * 2),
    ],
)
def test_geometric_median_has_the_least_sum_of_distances(
    points: list[list[float]], weights: tuple[float, ...], expected: list[float]
) -> None:
    parameters: dict[str, Any] = {"weight": weights, "max_iter": 200, "tol": 1e-9}
    merged = run_kernel(find_op("geometric_median").kernel(parameters), [torch.tensor(x).float() for x in points])
    torch.testing.assert_close(merged, torch.tensor(expected).float(), rtol=1e-6, atol=1e-6)
