"""Deltas while a tensor is merged: their figures, how they are trimmed, and what they come to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from raymerge.ops.kernel import count_blocks
from raymerge.ops.kernels.random import numpy_table
from raymerge.ops.kernels.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, loops, np
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
            delta_loops.sum_delta(*piece.sources(), *where, *trims.arguments(), sums, loops.make_scratch(19))
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
        loops.make_scratch(4 + 2 * len(models[0])),
    )
    trims.end()
    for out, left in zip(outs, squares, strict=True) if len(outs) > 1 else ():
        out.squares[:] = left
    return [float(each) for each in finished]
