"""Merges in memory by compiled loops, on values as they are stored, in one buffer."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from itertools import pairwise

import numpy as np
import torch

from raymerge.ops.kernel import Kernel, KernelRun, Site
from raymerge.ops.stored import STRIP, Slot, Stored
from raymerge.pipeline.engine.threads import run_in_turn

_ALIGNMENT = 64


class LoopEngine:
    """Runs kernels on the same sources; those that measure the same measure once, then they take turns."""

    def __init__(self, tensors: Sequence[torch.Tensor], name: str, seed: int = 0) -> None:
        self._site = Site(name, tuple(tensors[0].shape), len(tensors), seed)
        self._dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
        self._offsets = []
        nbytes = 0
        for tensor in tensors:
            self._offsets.append(nbytes)
            nbytes += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        self._buffer = bytearray(nbytes)
        for tensor, offset in zip(tensors, self._offsets, strict=True):
            self._buffer[offset : offset + tensor.nbytes] = _bytes(tensor)
        self.figures: list[dict[str, float]] = []
        self.norms: list[float] = []

    def run(
        self,
        kernels: Sequence[Kernel],
        out_dtype: torch.dtype,
        *,
        window_blocks: int = 1,
        cuts: Sequence[int] = (),
        is_forked: bool = False,
    ) -> list[torch.Tensor]:
        """Return what each kernel makes of the sources, rounded, in the shape of the first source.

        Args:
            kernels: all with loops.
            out_dtype: that results are rounded to.
            window_blocks: how many blocks of the grid are measured at once.
            cuts: elements at which the results are cut, for buffers of the output that are full.
            is_forked: whether the pieces between them are forked, and combined in reverse order; without norms.
        """
        count = self._site.num_elements
        groups: dict[Hashable, list[int]] = {}
        for position, kernel in enumerate(kernels):
            assert kernel.loop_dtypes
            groups.setdefault(kernel.measuring(self._site), []).append(position)
        leaders = {group[0]: kernels[group[0]].start(self._site) for group in groups.values()}
        num_passes = {first: kernels[first].num_passes(self._site) for first in leaders}
        step = window_blocks * kernels[0].grid(self._site)
        for index in range(max(num_passes.values())):
            measuring = [run for first, run in leaders.items() if index < num_passes[first]]
            for start, stop in _cut(count, range(0, count, step)):
                measuring[0].measure_outputs(index, measuring, self._stored().cut(start, stop), run_in_turn)
            for run in measuring:
                run.end_pass(index)
        runs = dict(leaders)
        for first, *others in groups.values():
            runs |= {position: leaders[first].share(kernels[position]) for position in others}
        name = str(out_dtype).removeprefix("torch.")
        outs = [bytearray(count * out_dtype.itemsize) for _ in kernels]
        squares = [0.0] * len(kernels)
        lanes = [np.zeros(STRIP, np.float32) for _ in kernels]
        pieces = [self._stored().cut(start, stop) for start, stop in _cut(count, cuts)]
        ordered: Sequence[KernelRun] = [runs[position] for position in range(len(kernels))]
        forks: Sequence[Sequence[KernelRun]] = [ordered] * len(pieces)
        if is_forked and pieces:
            forks = list(zip(*(run.fork(pieces, run_in_turn) for run in ordered), strict=True))[::-1]
            pieces.reverse()
        for piece, each in zip(pieces, forks, strict=True):
            span = slice(piece.start * out_dtype.itemsize, piece.stop * out_dtype.itemsize)
            slots = [
                Slot(memoryview(out)[span], name, np.zeros(STRIP, np.float32) if is_forked else sums)
                for out, sums in zip(outs, lanes, strict=True)
            ]
            for position, finished in enumerate(each[0].combine_outputs(each, piece, slots)):
                squares[position] += finished
        self.figures = [dict(runs[position].figures()) for position in range(len(kernels))]
        self.norms = [(total + float(rest.sum())) ** 0.5 for total, rest in zip(squares, lanes, strict=True)]
        return [_tensor(out, out_dtype).reshape(self._site.shape) for out in outs]

    def _stored(self) -> Stored:
        return Stored(0, self._site.num_elements, memoryview(self._buffer), tuple(self._offsets), tuple(self._dtypes))


def _cut(count: int, cuts: Sequence[int]) -> Iterator[tuple[int, int]]:
    inner = sorted({cut for cut in cuts if 0 < cut < count})
    yield from pairwise([0, *inner, count]) if count else ()


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def _tensor(content: bytearray, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(content, dtype=dtype) if content else torch.empty(0, dtype=dtype)
