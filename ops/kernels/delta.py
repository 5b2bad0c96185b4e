"""Deltas while a tensor is merged: their figures, how they are trimmed, and what they come to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from raymerge.ops.kernel import Block, count_blocks
from raymerge.ops.kernels.sparsifiers.random import numpy_table
from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, np, sum_loops, torch
from raymerge.ops.stored import RunAll, Slot, Stored, find_slots

SMALLEST_SUM = 1e-7
"""A delta with a smaller sum of absolute values is not rescaled."""


class Delta:
    """One model's delta: how much of it there is, and which elements."""

    def __init__(self, source: int, weight: float, sparsifier: Sparsifier | None, rescaling: float = 1.0) -> None:
        self.source = source
        self.weight = weight
        self.sparsifier = sparsifier
        self._rescaling = rescaling
        self.full_sum = self.kept_sum = 0.0

    def take(self, measured: Delta) -> None:
        """Use what another run has measured on the same delta."""
        self.full_sum, self.kept_sum = measured.full_sum, measured.kept_sum
        if measured.sparsifier is not None:
            self.sparsifier = copy.copy(measured.sparsifier)

    def measure_stored(self, index: int, stored: Stored) -> None:
        """Take the figures of pass `index`, by loops."""
        sparsifier = self.sparsifier
        if sparsifier is None:
            return
        if index < sparsifier.num_passes:
            sparsifier.measure_stored(index, stored, self.source)
            return
        for piece in sparsifier.split(stored):
            trims = Trims([sparsifier], piece)
            sums = np.empty((count_blocks(piece.num_elements), 2))
            where = self.source, piece.start, piece.num_elements
            delta_loops.sum_delta(*piece.sources(), *where, *trims.arguments(), sums, sum_loops.make_scratch(19))
            trims.end()
            sparsifier.keep_mask(piece.start, trims.trims[0])
            for full, kept in sums.tolist():
                self.full_sum += full
                self.kept_sum += kept

    def fork(self, pieces: Sequence[Stored], run_all: RunAll) -> Sequence[Delta]:
        """Return one for each piece; see `KernelRun.fork`."""
        if self.sparsifier is None:
            return [self] * len(pieces)
        forks = []
        for sparsifier in self.sparsifier.fork(pieces, self.source, run_all):
            forks.append(copy.copy(self))
            forks[-1].sparsifier = sparsifier
        return forks

    @property
    def rescaling(self) -> float:
        """The factor that was given, or where sums were measured sum |d| / sum |mask * d|, as mergekit has it."""
        if self.full_sum < SMALLEST_SUM or self.kept_sum < SMALLEST_SUM:
            return self._rescaling
        return self.full_sum / self.kept_sum


class Trims:
    """Rules by which the deltas of some models are trimmed, as arguments of loops."""

    def __init__(self, sparsifiers: Sequence[Sparsifier | None], stored: Stored) -> None:
        self._sparsifiers = sparsifiers
        self.trims = trims = [Trim() if item is None else item.make_trim(stored) for item in sparsifiers]
        self._left = np.array([trim.left for trim in trims], np.int64)
        unused = np.zeros((1, 2), np.uint32)  # a page that loops refer to, and do not read
        pages = next((trim.keys for trim in trims if trim.keys is not None), unused)
        self._keys = np.zeros((len(trims), *pages.shape), np.uint32)
        for keys, trim in zip(self._keys, trims, strict=True):
            if trim.keys is not None:
                keys[:] = trim.keys

        masks = [trim.kept for trim in trims]
        count = stored.num_elements if any(mask is not None for mask in masks) else 0
        self._kept = np.zeros((len(trims), count), np.uint8)
        for kept, mask in zip(self._kept, masks, strict=True):
            if mask is not None:
                kept[:] = mask

    def arguments(self) -> tuple[Any, ...]:
        """Return the arguments by which loops find it."""
        return (
            np.array([trim.kind for trim in self.trims], np.int64),
            np.array([trim.limits for trim in self.trims], np.uint32),
            np.array([trim.word_limit for trim in self.trims], np.uint32),
            self._left,
            numpy_table(),
            self._keys,
            self._kept,
        )

    def end(self) -> None:
        """Give back what is left to be kept at a threshold."""
        for sparsifier, (lower, upper) in zip(self._sparsifiers, self._left.tolist(), strict=True):
            if sparsifier is not None:
                sparsifier.end_trim((lower, upper))


def combine_deltas(
    models: Sequence[Sequence[Delta]],
    rules: Sequence[tuple[Sequence[float], Sequence[float], float]],
    consensus: int,
    normalize: bool,
    stored: Stored,
    outs: Sequence[Slot],
) -> Sequence[float]:
    """Round the base and what comes of trimmed deltas to each slot, by loops; see `KernelRun.combine_outputs`.

    Args:
        models: for each slot, of the same sources.
        rules: factors and weights of the models, and the scale of what they come to, for each slot.
        consensus: see `delta_loops.combine_deltas`.
        normalize: whether what agrees is averaged.
        stored: sources.
        outs: slots.
    """
    factors, weights, scales = zip(*rules, strict=True)
    trims = Trims([model.sparsifier for each in models for model in each], stored)
    squares = outs[0].squares[None] if len(outs) == 1 else np.array([out.squares for out in outs])
    finished = np.zeros(len(outs))
    delta_loops.combine_deltas(
        *stored.sources(),
        np.array([model.source for model in models[0]], np.int64),
        np.array(factors, np.float32),
        np.array(weights, np.float32),
        consensus,
        normalize,
        np.array(scales, np.float32),
        np.array([min(each) for each in weights], np.float32),
        stored.start,
        stored.num_elements,
        *trims.arguments(),
        *find_slots(outs),
        squares,
        finished,
        sum_loops.make_scratch(4 + 2 * len(models[0])),
    )
    trims.end()
    for out, left in zip(outs, squares, strict=True) if len(outs) > 1 else ():
        out.squares[:] = left
    return [float(each) for each in finished]


def combine_block(
    models: Sequence[Delta],
    rule: tuple[Sequence[float], Sequence[float], float],
    consensus: str,
    normalize: bool,
    block: Block,
    out: torch.Tensor,
) -> None:
    """Write the base and what comes of trimmed deltas to `out`, by torch.

    Args:
        models: at least one.
        rule: their factors and weights, and the scale of what they come to.
        consensus: of `SparseDeltas`.
        normalize: whether what agrees is averaged.
        block: sources, and scratch.
        out: one value for each element of the block.
    """
    base = block.load(0, block.scratch[0])
    if consensus == "sum":
        _add_agreeing(models, rule, normalize, block, out)
    else:
        _add_all(models, rule, consensus == "overlap", block, out)
    if (scale := rule[2]) != 1:
        out.mul_(scale)
    out.add_(base)


def _add_all(
    models: Sequence[Delta],
    rule: tuple[Sequence[float], Sequence[float], float],
    is_averaged: bool,
    block: Block,
    out: torch.Tensor,
) -> None:
    """Source: Ilharco et al. 2023, "Editing Models with Task Arithmetic", section 2."""
    factors, weights, _ = rule
    for position, (model, factor, weight) in enumerate(zip(models, factors, weights, strict=True)):
        delta = _load_delta(model, block, block.scratch[3] if position else out)
        if factor != 1:
            delta.mul_(factor)
        if position:
            out.add_(delta)
        if is_averaged:
            took_part = torch.ne(delta, 0, out=block.scratch[1 if position else 4]).mul_(weight)
            if position:
                block.scratch[4].add_(took_part)
    if is_averaged:
        divisor = block.scratch[4]
        out.div_(divisor.add_(torch.eq(divisor, 0, out=block.scratch[1])))


def _add_agreeing(
    models: Sequence[Delta],
    rule: tuple[Sequence[float], Sequence[float], float],
    normalize: bool,
    block: Block,
    out: torch.Tensor,
) -> None:
    """Source: Yadav et al. 2023, "TIES-Merging", algorithm 1, steps 2 and 3."""
    factors, weights, _ = rule
    deltas = []
    for model, factor, delta in zip(models, factors, block.scratch[3:], strict=False):
        _load_delta(model, block, delta)
        if factor != 1:
            delta.mul_(factor)
        deltas.append(delta)
    signs, spare = block.scratch[1:3]
    total = deltas[0]
    for delta in deltas[1:]:
        total = torch.add(total, delta, out=signs)
    torch.ge(total, 0, out=signs).mul_(2).sub_(1)
    torch.threshold_(torch.mul(deltas[0], signs, out=out), 0, 0)
    if normalize:
        torch.sign(out, out=deltas[0])
    for delta in deltas[1:]:
        out.add_(torch.threshold_(delta.mul_(signs), 0, 0))
        if normalize:
            delta.sign_()
    if normalize:
        out.div_(_sum_weights(deltas, weights, spare))
    out.mul_(signs)


def _load_delta(model: Delta, block: Block, delta: torch.Tensor) -> torch.Tensor:
    """Write one model's thinned delta to `delta`; the base is in the first scratch block already."""
    base, first, second = block.scratch[:3]
    block.load(model.source, delta).sub_(base)
    if model.sparsifier is not None:
        model.sparsifier.trim(block.start, delta, (first, second))
    return delta


def _sum_weights(took_part: list[torch.Tensor], weights: Sequence[float], spare: torch.Tensor) -> torch.Tensor:
    """Return the weights of the models that took part in each element, 1 where they sum to 0; overwrites its arguments.

    Args:
        took_part: for each model, 1 where it took part and 0 elsewhere.
        weights: one for each model.
        spare: a block of scratch.
    """
    for ones, weight in zip(took_part, weights, strict=True):
        if weight != 1:
            ones.mul_(weight)
    total = took_part[0]
    for ones in took_part[1:]:
        total.add_(ones)
    if min(weights) > 0:
        return total.clamp_(min=min(weights))
    return total.add_(torch.eq(total, 0, out=spare))
