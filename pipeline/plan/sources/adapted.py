"""Weighted sums of one base with different adapters: one reading of the base, plus all updates at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

from raymerge.ops.kernel import Kernel
from raymerge.ops.kernels.linear import SMALLEST_SHARE, LinearCombination
from raymerge.ops.kernels.sparse_deltas import SparseDeltas
from raymerge.pipeline.checkpoint.adapters.source import Update, UpdatedTensor
from raymerge.pipeline.checkpoint.source import Source


def join_adapted(sources: Sequence[Source], kernel: Kernel) -> tuple[tuple[Source, ...], Kernel]:
    """Return sources and kernel with the same result, up to rounding, and each base among the sources once.

    sum(w_i * (x + u_i)) is c * (x + sum(w_i / c * u_i)) for c = sum(w_i), and x + sum(w_i * ((x + u_i) - x)) is
    x + sum(w_i * u_i): a hundred adapters then cost no more than one of all of their ranks together.

    Args:
        sources: of one output tensor, in the kernel's order.
        kernel: of the tensor.
    """
    if isinstance(kernel, LinearCombination):
        return _join_linear(sources, kernel)
    coefficients = find_coefficients(kernel)
    return (tuple(sources), kernel) if coefficients is None else _join_deltas(sources, coefficients, kernel)


def find_coefficients(kernel: Kernel) -> list[float] | None:
    """Return the factor of each source, the base left out, in a weighted sum of sources or of differences from a base.

    None where a kernel is no such sum.
    """
    if isinstance(kernel, LinearCombination):
        return [coefficient / kernel.divisor for coefficient in kernel.coefficients]
    is_sum = isinstance(kernel, SparseDeltas) and (kernel.sparsifier, kernel.consensus) == ("none", "none")
    if isinstance(kernel, SparseDeltas) and is_sum and not any(kernel.gammas):
        return [kernel.scale_of_sum * weight for weight in kernel.weights]
    return None


def _join_linear(sources: Sequence[Source], kernel: LinearCombination) -> tuple[tuple[Source, ...], Kernel]:
    groups: dict[str, list[tuple[Source, float]]] = {}
    for source, coefficient in zip(sources, kernel.coefficients, strict=True):
        groups.setdefault(_key(_split(source)[0]), []).append((source, coefficient))
    joined: list[Source] = []
    coefficients: list[float] = []
    for group in groups.values():
        total = sum(coefficient for _, coefficient in group)
        if len(group) == 1 or abs(total) <= SMALLEST_SHARE * sum(abs(coefficient) for _, coefficient in group):
            joined += [source for source, _ in group]
            coefficients += [coefficient for _, coefficient in group]
            continue
        joined.append(_add([(source, coefficient / total) for source, coefficient in group]))
        coefficients.append(total)
    if len(joined) == 1:
        return tuple(joined), LinearCombination((coefficients[0] / kernel.divisor,))
    return tuple(joined), replace(kernel, coefficients=tuple(coefficients))


def _join_deltas(
    sources: Sequence[Source], weights: Sequence[float], kernel: Kernel
) -> tuple[tuple[Source, ...], Kernel]:
    base, *models = sources
    if any(_key(_split(model)[0]) != _key(base) for model in models):
        return tuple(sources), kernel
    return (_add([(base, 1.0), *zip(models, weights, strict=True)]),), LinearCombination((1.0,))


def _split(source: Source) -> tuple[Source, tuple[Update, ...]]:
    """Return what is below an update, and the update."""
    return (source.below, source.updates) if isinstance(source, UpdatedTensor) else (source, ())


def _key(source: Source) -> str:
    return json.dumps(source.identity)


def _add(group: Sequence[tuple[Source, float]]) -> Source:
    """Return the common base of some sources plus their updates, each times a factor."""
    updated = [(source, factor) for source, factor in group if isinstance(source, UpdatedTensor)]
    if not updated:
        return group[0][0]
    updates = tuple(
        replace(update, term=replace(update.term, scale=update.term.scale * factor))
        for source, factor in updated
        for update in source.updates
    )
    return replace(updated[0][0], model=group[0][0].model, updates=updates)
