"""Every merge method as plain float64 code on whole tensors: what the block engine is compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raymerge.ops.kernels.sparsifiers.random import RandomBits, RandomSparsifier
from raymerge.ops.registry import Base, find_op
from tests.angles import merge_angles
from tests.matrices import merge_matrices

Tensors = Sequence[torch.Tensor]
Parameters = Mapping[str, Any]
"""As in the YAML, with one value for each model where there is one."""
Keep = Callable[[torch.Tensor, int], torch.Tensor]
"""Returns a delta with what is dropped set to zero, given the model's position."""


@dataclass
class Exact:
    """What a method gives."""

    values: torch.Tensor
    """Float64."""
    terms: torch.Tensor
    """The sum of the absolute values of what was added up: rounding errors are relative to it."""
    is_draw: torch.Tensor
    """Where an election is so close that float32 may decide it the other way."""


def find_exact(op: str, tensors: Tensors, parameters: Parameters, *, name: str = "", seed: int = 0) -> Exact:
    """Return what an op makes of sources in config order, a base first.

    Args:
        op: its name.
        tensors: of any dtype.
        parameters: what is not given has its default.
        name: of the output tensor.
        seed: the merge's.
    """
    if op == "fisher":
        return _average_by_information(tensors, parameters["weight"])
    has_base = find_op(op).base is Base.REQUIRED or len(parameters.get("weight", tensors)) < len(tensors)
    num_models = len(tensors) - has_base
    defaults = {p.name: (p.default,) * num_models if p.per_model else p.default for p in find_op(op).parameters}
    values: dict[str, Any] = defaults | dict(parameters)

    def keep_largest(delta: torch.Tensor, position: int) -> torch.Tensor:
        return _keep_largest(delta, values["density"][position])

    def keep_inner(delta: torch.Tensor, position: int) -> torch.Tensor:
        return _keep_inner(delta, values["density"][position], values["gamma"][position])

    def keep_random(delta: torch.Tensor, position: int) -> torch.Tensor:
        return delta * _random_mask(delta, values["density"][position], seed, name, position)

    def keep_by_rank(delta: torch.Tensor, position: int) -> torch.Tensor:
        density, epsilon = values["density"][position], values["epsilon"][position]
        is_exact = values["rescale_mode"] == "inverse_density" and parameters.get("rescale", True)
        chances = find_chances(delta, density, epsilon)
        return delta * (_draw(delta, seed, name, position) < chances) / (chances.clamp(1e-9, 1) if is_exact else 1)

    match op:
        case "linear":
            return _linear(tensors, values["weight"], normalize=values["normalize"])
        case "regmean":  # without Gram matrices
            return _linear(tensors, (1.0,) * len(tensors), normalize=True)
        case "passthrough":
            return _linear(tensors, values["scale"], normalize=False)
        case "slerp":
            return _slerp(tensors, values["t"])
        case "nuslerp" | "multislerp" | "karcher" | "model_stock" | "geometric_median" | "metagpt":
            terms = torch.stack([x.double().abs() for x in tensors]).sum(0)
            merged = merge_angles(op, tensors, values)
            return Exact(merged, terms, torch.zeros_like(merged, dtype=torch.bool))
        case "expo":
            return _linear(tensors, (-values["alpha"], 1 + values["alpha"]), normalize=False)
        case "assembly_of_experts":
            root = math.sqrt(tensors[0].numel())
            differences = [float((x.double() - tensors[0].double()).norm()) / root for x in tensors[1:]]
            is_taken = [d > values["delta"] for d, w in zip(differences, values["weight"], strict=True) if w]
            weights = values["weight"] if any(is_taken) else (0.0,) * num_models
            deltas = [w * (x.double() - tensors[0].double()) for w, x in zip(weights, tensors[1:], strict=True)]
            return _add_up(torch.stack([tensors[0].double(), *deltas]))
        case "task_arithmetic":
            return _task_arithmetic(tensors, values | {"rescale": False}, lambda delta, _: delta)
        case "dare_linear":
            return _task_arithmetic(tensors, values, keep_random)
        case "ties":
            return _task_arithmetic(tensors, values, keep_largest, elects=True)
        case "breadcrumbs" | "breadcrumbs_ties":
            return _task_arithmetic(tensors, values, keep_inner, elects=op == "breadcrumbs_ties")
        case "della" | "della_linear":
            # what is kept is divided by its probability in `keep_by_rank`
            values["rescale"] = values["rescale"] and values["rescale_mode"] == "l1"
            return _task_arithmetic(tensors, values, keep_by_rank, elects=op == "della")
        case "localize_and_stitch":
            return _stitch(tensors, keep_largest, values["lambda"])
        case "pcb":
            return _compete(tensors, values)
        case "cabs":
            return _take_turns(tensors, values)
        case "magmax":
            return _magmax(tensors, values["lambda"])
        case "consensus":
            return _agree(tensors, values)
        case "emr":
            return _elect(tensors, values["lambda"])
        case "dare_ties":
            return _task_arithmetic(tensors, values, keep_random, elects=True)
        case "sce":
            return _sce(tensors, values["select_topk"])
        case "arcee_fusion":
            return _arcee_fusion(tensors)
        case "nearswap":
            return _nearswap(tensors, values["t"])
        case "ram":
            return _reinforce(tensors, values | {"r": 0.0, "alpha": 0.0})
        case "ramplus_tl":
            return _reinforce(tensors, values)
        case "knots" if tensors[0].dim() not in (2, 3):
            untouched = {"normalize": True, "rescale": False}
            return _task_arithmetic(tensors, values | untouched, keep_largest, elects=True)
        case "tsv" | "iso_c" | "iso_cts" | "star" | "wudi" | "knots":
            terms = torch.stack([x.double().abs() for x in tensors]).sum(0)
            merged = merge_matrices(op, tensors, values)
            return Exact(merged, terms, torch.zeros_like(merged, dtype=torch.bool))
    raise NotImplementedError(f"write {op} as plain float64 code in tests/references.py")


def _linear(tensors: Tensors, weights: Sequence[float], *, normalize: bool) -> Exact:
    products = torch.stack([weight * x.double() for weight, x in zip(weights, tensors, strict=True)])
    products /= sum(weights) if normalize else 1
    return _add_up(products)


def _slerp(tensors: Tensors, t: float) -> Exact:
    a, b = (x.double() for x in tensors)
    unit_a, unit_b = (x / x.norm() if x.norm() > 1e-8 else x for x in (a, b))
    cosine = float((unit_a * unit_b).sum())
    if abs(cosine) > 0.9995:
        return _add_up(torch.stack([(1 - t) * a, t * b]))
    angle = math.acos(cosine)
    return _add_up(torch.stack([math.sin((1 - t) * angle) * a, math.sin(t * angle) * b]) / math.sin(angle))


def _average_by_information(tensors: Tensors, weights: Sequence[float]) -> Exact:
    models, information = (torch.stack([*part]).double() for part in (tensors[: len(weights)], tensors[len(weights) :]))
    factors = torch.tensor(weights, dtype=torch.float64).reshape(-1, *(1 for _ in tensors[0].shape)) * information
    return _add_up(models * factors / factors.sum(0))


def _compete(tensors: Tensors, values: Parameters) -> Exact:
    deltas = _list_deltas(tensors).flatten(1)
    num_models, num_elements = deltas.shape
    base = tensors[0].double()
    ascending = deltas.abs().sort(1).values
    low = ascending[:, int(num_elements * 1e-4), None]
    high = ascending[:, max(0, int(num_elements * (1 - 1e-4) - 1)), None]
    cut = deltas.abs().clamp(low, high)
    own = ((cut - low) / (high - low).clamp(min=1e-300)) ** 2
    scores = torch.exp(num_models * own) * torch.tanh(deltas * deltas.sum(0))
    ranks = [min(num_elements - 1, int(num_elements * (1 - density))) for density in values["density"]]
    thresholds = scores.sort(1).values.gather(1, torch.tensor(ranks)[:, None])
    above = (scores - thresholds.clamp(min=0)).clamp(min=0)
    weights = above / (scores.amax(1, keepdim=True) - thresholds.clamp(min=0)).clamp(min=1e-300)
    merged = (deltas.sign() * cut * weights).sum(0) / weights.sum(0).clamp(min=1e-12)
    exact = _add_up(torch.stack([base, values["lambda"] * merged.reshape(base.shape)]))
    is_close = (scores - thresholds).abs() < 1e-2 * thresholds  # so that the weight is a difference of like numbers
    is_draw = is_close.any(0) | ((weights.sum(0) > 0) & (weights.sum(0) < 1e-6))
    return Exact(exact.values, exact.terms, is_draw.reshape(base.shape))


def _take_turns(tensors: Tensors, values: Parameters) -> Exact:
    deltas = _list_deltas(tensors).flatten(1)
    products = [tensors[0].double().flatten()]
    is_free = torch.ones_like(deltas[0], dtype=torch.bool)
    for delta, weight, num_kept in zip(deltas, values["weight"], values["n_val"], strict=True):
        is_kept = torch.zeros_like(is_free)
        whole = delta.numel() // values["m_val"] * values["m_val"]
        for part, columns in ((slice(0, whole), values["m_val"]), (slice(whole, None), delta.numel() - whole)):
            groups = (delta * is_free)[part].reshape(-1, max(1, columns))
            order = torch.sort(groups.abs(), dim=1, descending=True, stable=True).indices
            chosen = torch.zeros_like(groups, dtype=torch.bool)
            chosen.scatter_(1, order[:, : num_kept * columns // values["m_val"]], True)
            is_kept[part] = (chosen & (groups != 0)).flatten()
        is_free &= ~is_kept
        products.append(values["lambda"] * weight * delta * is_kept)
    exact = _add_up(torch.stack(products))
    shape = tensors[0].shape
    return Exact(exact.values.reshape(shape), exact.terms.reshape(shape), exact.is_draw.reshape(shape))


def _stitch(tensors: Tensors, keep: Keep, scale: float) -> Exact:
    kept = torch.stack([keep(delta, position) for position, delta in enumerate(_list_deltas(tensors))])
    stitched = scale * kept / (kept != 0).sum(0).clamp(min=1)
    return _add_up(torch.cat([tensors[0].double()[None], stitched]))


def _magmax(tensors: Tensors, scale: float) -> Exact:
    deltas = _list_deltas(tensors)
    sizes = deltas.abs().flip(0)
    chosen = len(deltas) - 1 - sizes.argmax(0)  # of equal ones the first of the flipped
    return _add_up(torch.stack([tensors[0].double(), scale * deltas.gather(0, chosen[None])[0]]))


def _agree(tensors: Tensors, values: Parameters) -> Exact:
    deltas = _list_deltas(tensors)
    total = deltas.sum(0)
    limits = torch.stack(
        [rate * (total - delta).abs() for rate, delta in zip(values["mask_lambda"], deltas, strict=True)]
    )
    is_kept = (deltas.abs() >= limits).sum(0) >= values["k"]
    is_draw = ((deltas.abs() - limits).abs() < 1e-5 * limits).any(0)
    exact = _add_up(torch.cat([tensors[0].double()[None], values["lambda"] * deltas]))
    return Exact(tensors[0].double() + values["lambda"] * total * is_kept, exact.terms, is_draw)


def _elect(tensors: Tensors, scale: float) -> Exact:
    deltas = _list_deltas(tensors)
    total = deltas.sum(0)
    elected = total.sign() * (deltas * total.sign()).clamp(min=0).amax(0)
    exact = _add_up(torch.stack([tensors[0].double(), scale * elected]))
    return Exact(exact.values, exact.terms, (total.abs() < 1e-6 * deltas.abs().sum(0)) & (total != 0))


def _list_deltas(tensors: Tensors) -> torch.Tensor:
    """Return differences to the base, taken in float32, for their order decides what is kept."""
    return torch.stack([(x.float() - tensors[0].float()).double() for x in tensors[1:]])


def _nearswap(tensors: Tensors, t: float) -> Exact:
    base, model = (x.double() for x in tensors)
    weights = (t / (base - model).abs().clamp(min=1e-6)).clamp(0, 1)
    return _add_up(torch.stack([weights * model, base, -weights * base]))


def _reinforce(tensors: Tensors, values: Parameters) -> Exact:
    base = tensors[0].double()
    deltas = [(x.float() - tensors[0].float()).double() for x in tensors[1:]]
    changed = [delta.abs().float() > values["epsilon"] for delta in deltas]
    count = sum(mask.double() for mask in changed)
    terms = [base]
    for delta, mask in zip(deltas, changed, strict=True):
        num_unique, num_changed = (mask & (count == 1)).sum().item(), mask.sum().item()
        share = (num_changed - num_unique) / max(num_unique, values["epsilon"])
        growth = 1 + values["r"] * min(share, values["alpha"])
        terms.append(torch.where(mask, torch.where(count == 1, delta * growth, delta / count), 0.0))
    return _add_up(torch.stack(terms))


def _sce(tensors: Tensors, share: float) -> Exact:
    base, *models = (x.float() for x in tensors)
    if not models:
        return _add_up(base.double()[None])
    deltas = torch.stack([x - base for x in models]).double()
    if share < 1:
        variance = deltas.var(0, unbiased=False).float()
        kept = _keep_largest(variance, max(0.0, share) * int(variance.count_nonzero()) / max(1, variance.numel()))
        deltas *= kept != 0
    squares = deltas.square().flatten(1).mean(1)
    shares = squares / squares.sum() if squares.sum() >= 1e-6 else torch.full_like(squares, 1 / len(models))
    weights = shares.reshape(-1, *(1 for _ in base.shape))
    takes_part = deltas.sign() == torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    divisor = (weights * takes_part).sum(0).clamp(min=1e-6)
    products = deltas * weights * takes_part / divisor
    is_draw = deltas.sum(0).abs() < 1e-6 * deltas.abs().sum(0)
    return Exact(base.double() + products.sum(0), base.double().abs() + products.abs().sum(0), is_draw)


def _arcee_fusion(tensors: Tensors) -> Exact:
    base, model = (x.double() for x in tensors)
    p, q = (x.softmax(-1) + 1e-8 for x in (model, base))
    divergence = (p * (p / q).log()).sum(-1, keepdim=True).clamp(min=0)
    importance = ((model.float() - base.float()).abs() * divergence.float()).double()
    ranked = importance.flatten().sort().values
    low, median, high = (ranked[int(share * (len(ranked) - 1))] for share in (0.25, 0.5, 0.75))
    threshold = median + 1.5 * (high - low)
    is_draw = (importance - threshold).abs() < 1e-6 * threshold
    return Exact(torch.where(importance >= threshold, model, base), base.abs(), is_draw)


def _add_up(products: torch.Tensor) -> Exact:
    total = products.sum(0)
    return Exact(total, products.abs().sum(0), torch.zeros_like(total, dtype=torch.bool))


def _task_arithmetic(tensors: Tensors, values: Parameters, keep: Keep, *, elects: bool = False) -> Exact:
    weights = values["weight"]
    base = tensors[0].double()
    if not weights:
        return _add_up(base[None])
    # Differences are taken in float32, for their order decides what is kept.
    deltas = [(x.float() - tensors[0].float()).double() for x in tensors[1:]]
    kept = [_thin(delta, keep(delta, position), values, position) for position, delta in enumerate(deltas)]
    votes = torch.stack([weight * delta for weight, delta in zip(weights, kept, strict=True)])
    sizes = votes.abs().sum(0)
    total = votes.sum(0)
    takes_part = votes.sign() == torch.where(total >= 0, 1.0, -1.0) if elects else torch.ones_like(votes)
    mixed = (votes * takes_part).sum(0)
    if values["normalize"]:
        divisor = (torch.tensor(weights, dtype=torch.float64).reshape(-1, *(1 for _ in base.shape)) * takes_part).sum(0)
        divisor = torch.where(divisor.abs() < 1e-8, 1.0, divisor)
        mixed, sizes = mixed / divisor, sizes / divisor.abs()
    is_draw = (total.abs() < 1e-6 * votes.abs().sum(0)) & elects
    return Exact(base + values["lambda"] * mixed, base.abs() + abs(values["lambda"]) * sizes, is_draw)


def _thin(delta: torch.Tensor, kept: torch.Tensor, values: Parameters, position: int) -> torch.Tensor:
    if values["rescale"] and values.get("rescale_mode") == "inverse_density":
        return kept / min(1.0, values["density"][position]) if values["density"][position] > 0 else kept
    if values["rescale"] and kept.abs().sum() > 1e-7:
        return kept * (delta.abs().sum() / kept.abs().sum())
    return kept


def _keep_largest(delta: torch.Tensor, density: float) -> torch.Tensor:
    if density <= 0:
        return torch.zeros_like(delta)
    flat = delta.reshape(-1)
    num_kept = flat.numel() if density >= 1 else max(1, int(density * flat.numel()))
    order = torch.sort(flat.abs(), descending=True, stable=True).indices  # among equals the first
    kept = torch.zeros_like(flat)
    kept[order[:num_kept]] = flat[order[:num_kept]]
    return kept.reshape(delta.shape)


def find_chances(delta: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Return the probabilities of DELLA, by the ranks of sizes in each row; equal ones share their mean rank.

    Sizes with the same exponent and 6 binary places are equal.
    """
    if not 0 < density < 1:
        return torch.full_like(delta, density >= 1)
    sizes = (delta.float().abs().view(torch.int32) >> 17).reshape(-1, delta.shape[-1])
    length = sizes.shape[1]
    if length == 1:
        return torch.full_like(delta, density)
    ranks = torch.empty(sizes.shape, dtype=torch.float64)
    for row, found in zip(sizes, ranks, strict=True):
        _, places, counts = row.unique(return_inverse=True, return_counts=True)
        found[:] = (counts.cumsum(0) - (counts + 1) / 2)[places]
    return (density - epsilon + 2 * epsilon * ranks / (length - 1)).reshape(delta.shape)


def _draw(delta: torch.Tensor, seed: int, name: str, position: int) -> torch.Tensor:
    """Return a random number from 0 to 1 for each element; test_random.py in tests/ops holds which ones."""
    spares = torch.empty(delta.numel()), torch.empty(delta.numel())
    RandomBits(seed, name, position).write(0, spares)
    words = torch.from_numpy(spares[0].numpy().view(np.uint32).astype(np.float64))
    return (words / 2**32).reshape(delta.shape)


def _keep_inner(delta: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Keep ranks [bot, n - top) of ascending size; of equals at either end, the first."""
    if not 0 < density < 1:
        return delta * (density >= 1)
    flat = delta.reshape(-1)
    n = flat.numel()
    num_kept, top = max(1, int(density * n)), int(gamma * n)
    bot = n - num_kept - top
    if bot < 0:
        top, bot = top + bot, 0
    sizes = flat.abs()
    ascending = sizes.sort().values
    low, high = ascending[bot], ascending[n - top - 1]
    kept = (sizes > low) & (sizes < high)
    for end, num_there in (
        (low, int((ascending[bot : n - top] == low).sum())),
        (high, int((ascending[bot : n - top] == high).sum())),
    ):
        kept[(sizes == end).nonzero()[:num_there, 0]] = True
    assert int(kept.sum()) == num_kept
    return (flat * kept).reshape(delta.shape)


def _random_mask(delta: torch.Tensor, density: float, seed: int, name: str, position: int) -> torch.Tensor:
    """Draw the mask as the product does; tests/ops/kernels/sparsifiers/test_random.py holds what is drawn."""
    if not 0 < density < 1:
        return torch.full_like(delta, density >= 1)
    mask = torch.ones(delta.numel())
    sparsifier = RandomSparsifier(density, seed=seed, name=name, position=position)
    sparsifier.trim(0, mask, (torch.empty_like(mask), torch.empty_like(mask)))
    return mask.double().reshape(delta.shape)
