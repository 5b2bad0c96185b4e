"""Decoders for DoRA's scaled rows, and for the updates that LoRA adapters make to biases."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from raymerge.ops.decoders.decoder import Decoder, Plain, Raw, find_dtype
from raymerge.ops.lazy import np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

_TILE_ELEMENTS = 2**19
"""Elements of the whole rows that are decoded at once."""


@dataclass(frozen=True, slots=True)
class ScaledRows(Decoder):
    """Each row of a matrix, scaled to a stored norm: float32(x * (norm_i / ||x_i||)).

    The last piece has the norms of the rows at hand; the others those of whole rows below.

    Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation", equation 5.
    """

    below: Decoder
    columns: int
    dtype: str
    """Dtype of the stored norms, as torch names it."""

    @property
    def has_loops(self) -> bool:
        """Return whether there are loops for what is below and for the norms."""
        return self.below.has_loops and Plain(self.dtype).has_loops

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the room for whole rows, and for their squares in float64."""
        tile = min(num_elements + 2 * self.columns, max(_TILE_ELEMENTS, self.columns))
        return self.below.temporary_nbytes(tile) + 36 * tile

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Scale a tile of whole rows at a time."""
        first, last = _whole_rows(raw.start, raw.stop, self.columns)
        norms = torch.empty((last - first) // self.columns, dtype=torch.float32, device=out.device)
        Plain(self.dtype).decode(Raw(raw.pieces[-1:], 0, len(norms)), 0, len(norms), norms)
        below = Raw(raw.pieces[:-1], first, last)
        for begin, end in self._tiles(start, stop):
            rows = torch.empty(end - begin, dtype=torch.float32, device=out.device)
            values = self.below.decode(below, begin, end, rows).view(-1, self.columns).double()
            squares = values * values
            while (width := squares.shape[1]) > 1:  # halves are added, so that the order is the same everywhere
                half = (width + 1) // 2
                folded = squares[:, :half].clone()
                folded[:, : width - half] += squares[:, half:]
                squares = folded
            wanted = norms[(begin - first) // self.columns : (end - first) // self.columns].double().unsqueeze(1)
            scaled = (values * (wanted / squares.sqrt())).view(-1)
            low, high = max(start, begin), min(stop, end)
            out[low - start : high - start].copy_(scaled[low - begin : high - begin])
        return out

    def decode_stored(
        self, pieces: Sequence[memoryview], span: tuple[int, int], start: int, stop: int, out: NDArray[np.float32]
    ) -> None:
        """Do the same without torch."""
        first, last = _whole_rows(*span, self.columns)
        norms = np.empty((last - first) // self.columns, np.float32)
        Plain(self.dtype).decode_stored(pieces[-1:], (0, len(norms)), 0, len(norms), norms)
        for begin, end in self._tiles(start, stop):
            rows = np.empty(end - begin, np.float32)
            self.below.decode_stored(pieces[:-1], (first, last), begin, end, rows)
            values = rows.reshape(-1, self.columns).astype(np.float64)
            squares = values * values
            while (width := squares.shape[1]) > 1:
                half = (width + 1) // 2
                folded = squares[:, :half].copy()
                folded[:, : width - half] += squares[:, half:]
                squares = folded
            wanted = norms[(begin - first) // self.columns : (end - first) // self.columns, None].astype(np.float64)
            with np.errstate(all="ignore"):
                scaled = (values * (wanted / np.sqrt(squares))).ravel()
                low, high = max(start, begin), min(stop, end)
                out[low - start : high - start] = scaled[low - begin : high - begin]

    def compile_loops(self) -> None:
        """Compile those of what is below."""
        self.below.compile_loops()

    def _tiles(self, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Yield elements [first, last) of some whole rows, of those that elements [start, stop) are in."""
        begin, last = _whole_rows(start, stop, self.columns)
        step = max(1, _TILE_ELEMENTS // self.columns) * self.columns
        for first in range(begin, last, step):
            yield first, min(first + step, last)


@dataclass(frozen=True, slots=True)
class AddedVector(Decoder):
    """Values plus others of the same shape, in the last piece: float32(x + scale * y), in float64 until then."""

    below: Decoder
    dtype: str
    """Dtype of the stored update, as torch names it."""
    scale: float

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the room for both in float64."""
        return self.below.temporary_nbytes(num_elements) + 16 * num_elements

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Add the others."""
        self.below.decode(Raw(raw.pieces[:-1], raw.start, raw.stop), start, stop, out)
        added = raw.pieces[-1].view(find_dtype(self.dtype))[start - raw.start : stop - raw.start].double()
        return out.copy_(added.mul_(self.scale).add_(out))


def _whole_rows(start: int, stop: int, columns: int) -> tuple[int, int]:
    """Return the elements [first, last) of the whole rows that elements [start, stop) are in.

    >>> _whole_rows(5, 9, 4)
    (4, 12)
    """
    return start // columns * columns, -(-stop // columns) * columns
