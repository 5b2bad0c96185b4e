"""Values that another merge makes on the way: decoded from the bytes of its sources, and written nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from raymerge.ops.decoders.decoder import Decoder, Raw, find_dtype
from raymerge.ops.kernel import Block, Kernel, KernelRun, Site
from raymerge.ops.lazy import torch

_ITEM_NBYTES = {"float32": 4, "float64": 8}


class Part(Protocol):
    """A source of the merge: how it is decoded, and into how many pieces the bytes of some elements come."""

    @property
    def decoder(self) -> Decoder:
        """Decoder that turns the bytes into values."""

    @property
    def num_elements(self) -> int:
        """Elements of the whole source."""

    def ranges(self, start: int, stop: int) -> Sequence[object]:
        """Return something for each piece of the bytes of elements [start, stop)."""


def cover(start: int, stop: int, grid: int, num_elements: int) -> tuple[int, int]:
    """Return the elements of the whole blocks that hold some elements.

    >>> cover(3, 9, 4, 10), cover(0, 8, 4, 10), cover(4, 4, 4, 10)
    ((0, 10), (0, 8), (4, 4))
    """
    first = start // grid * grid
    return (first, first) if start == stop else (first, min(-(-stop // grid) * grid, num_elements))


@dataclass(frozen=True, slots=True)
class Intermediate(Decoder):
    """Merges block by block what it decodes, and rounds it, as if it had been written and read again."""

    kernel: Kernel
    site: Site
    parts: tuple[Part, ...]
    """The sources of the merge, in its order."""
    dtype: str
    """Dtype that the result is rounded to, as torch names it."""
    num_whole: int = 0
    """Number of the last parts that are needed whole for any block."""

    @property
    def grid(self) -> int:
        """Elements of a block of the merge: all where a part is needed whole."""
        num_elements = self.site.num_elements
        return max(1, num_elements if self.num_whole else min(self.kernel.grid(self.site), num_elements))

    def find_span(self, position: int, start: int, stop: int) -> tuple[int, int]:
        """Return the elements of a part that elements [start, stop), which are whole blocks, are merged from."""
        if position < len(self.parts) - self.num_whole:
            return start, stop
        return 0, self.parts[position].num_elements

    @property
    def num_passes(self) -> int:
        """Passes that its own parts need, and after them those of its kernel."""
        return self.num_part_passes + self.kernel.num_passes(self.site)

    @property
    def num_part_passes(self) -> int:
        """Passes before the parts can be decoded."""
        return max((part.decoder.num_passes for part in self.parts), default=0)

    def state_nbytes(self, num_elements: int) -> int:
        """Return the memory of a block with scratch, of what was decoded last, and of the kernel and the parts."""
        item = _ITEM_NBYTES[self.kernel.compute_dtype]
        own = (self.grid * (2 + self.kernel.num_scratch(self.site)) + num_elements) * item
        parts = sum(part.decoder.state_nbytes(self.grid) for part in self.parts)
        return own + self.kernel.state_nbytes(self.site) + parts

    def temporary_nbytes(self, num_elements: int) -> int:
        """Return the bytes that the most demanding source takes to decode a block."""
        spans = (self.find_span(position, 0, self.grid) for position in range(len(self.parts)))
        found = (part.decoder.temporary_nbytes(stop) for part, (_, stop) in zip(self.parts, spans, strict=True))
        return max(found, default=0)

    def start(self) -> Decoder:
        """Return a decoder that measures first, and keeps the block that it has merged last."""
        return _Run(self)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Decode without having measured; see `Decoder.start`."""
        return self.start().decode(raw, start, stop, out)


def has_aligned_grids(decoder: Decoder, grid: int) -> bool:
    """Tell whether blocks of so many elements are whole blocks of a merge on the way, and of those before it."""
    if not isinstance(decoder, Intermediate):
        return True
    is_whole = grid % decoder.grid == 0 or decoder.grid == decoder.site.num_elements
    return is_whole and all(has_aligned_grids(part.decoder, decoder.grid) for part in decoder.parts)


class _Run(Decoder):
    """One merge on the way, on one worker; what it needs for a block is taken once."""

    def __init__(self, what: Intermediate) -> None:
        self._what = what
        self._decoders = [part.decoder.start() for part in what.parts]
        self._measured = what.kernel.start(what.site)
        self._run: KernelRun | None = None
        """Combines all blocks in order; another one does when they are asked for again."""
        self._room: list[torch.Tensor] = []
        """For a block: its result, and the kernel's scratch."""
        self._merged = _Kept(find_dtype(what.dtype))
        """The block that was merged last."""
        self._decoded = _Kept(find_dtype(what.dtype))
        """The block of sources that was decoded last."""

    @property
    def num_passes(self) -> int:
        """As declared."""
        return self._what.num_passes

    def measure(self, index: int, raw: Raw, start: int, stop: int) -> None:
        """Measure parts, and after that, by the kernel, each block that begins among the elements."""
        what, num_parts = self._what, self._what.num_part_passes
        raws = self._split(raw)
        if index < num_parts:
            for decoder, part in zip(self._decoders, raws, strict=True):
                if index < decoder.num_passes:
                    decoder.measure(index, part, start, stop)
            return
        grid = what.grid
        for first in range(-(-start // grid) * grid, stop, grid):
            block = self._open(raws, first, min(first + grid, what.site.num_elements))
            self._measured.measure(index - num_parts, block)

    def end_pass(self, index: int) -> None:
        """Evaluate a measuring pass of parts, or of the kernel."""
        num_parts = self._what.num_part_passes
        if index < num_parts:
            for decoder in self._decoders:
                if index < decoder.num_passes:
                    decoder.end_pass(index)
        else:
            self._measured.end_pass(index - num_parts)

    def decode(self, raw: Raw, start: int, stop: int, out: torch.Tensor) -> torch.Tensor:
        """Merge the blocks that hold the elements, but for those that the last call has left."""
        if not self._decoded.holds(start, stop):
            grid, num_elements = self._what.grid, self._what.site.num_elements
            for first in range(start // grid * grid, stop, grid):
                last = min(first + grid, num_elements)
                if not self._merged.holds(first, last):
                    self._merge(self._split(raw), first, last)
                low, high = max(first, start), min(last, stop)
                out[low - start : high - start].copy_(self._merged.values[low - first : high - first])
            self._decoded.keep(start, stop, out)
        return out.copy_(self._decoded.values)

    def _merge(self, raws: Sequence[Raw], start: int, stop: int) -> None:
        """Merge one block, and round it as if it were written."""
        if self._run is None or start == 0:
            self._run = self._measured.share(self._what.kernel)
        block = self._open(raws, start, stop)
        self._run.combine(block, block.out)
        self._merged.keep(start, stop, block.out)

    def _split(self, raw: Raw) -> list[Raw]:
        """Return each part's pieces of the whole blocks that hold what is there."""
        if (known := raw.memo.get("parts")) is not None:
            found: list[Raw] = known
            return found
        what = self._what
        bounds = cover(raw.start, raw.stop, what.grid, what.site.num_elements)
        raws, first = [], 0
        for position, part in enumerate(what.parts):
            start, stop = what.find_span(position, *bounds)
            count = len(part.ranges(start, stop))
            raws.append(Raw(raw.pieces[first : first + count], start, stop))
            first += count
        raw.memo["parts"] = raws
        return raws

    def _open(self, raws: Sequence[Raw], start: int, stop: int) -> _PartBlock:
        if not self._room:
            what = self._what
            device = next((piece.device for raw in raws for piece in raw.pieces), torch.device("cpu"))
            dtype, count = find_dtype(what.kernel.compute_dtype), 1 + what.kernel.num_scratch(what.site)
            self._room = [torch.empty(what.grid, dtype=dtype, device=device) for _ in range(count)]
        room = [scratch[: stop - start] for scratch in self._room]
        return _PartBlock(start, stop, room, self._decoders, raws, len(raws) - self._what.num_whole)


class _Kept:
    """Rounded values of some elements, kept for whoever asks for them again."""

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._bounds: tuple[int, int] | None = None
        self._room: torch.Tensor | None = None

    @property
    def values(self) -> torch.Tensor:
        """The values, without the rest of the room."""
        assert self._room is not None
        assert self._bounds is not None
        start, stop = self._bounds
        return self._room[: stop - start]

    def holds(self, start: int, stop: int) -> bool:
        """Tell whether these elements are kept."""
        return self._bounds == (start, stop)

    def keep(self, start: int, stop: int, values: torch.Tensor) -> None:
        """Keep elements [start, stop) in the place of what was kept."""
        if self._room is None or len(self._room) < stop - start:
            self._room = torch.empty(stop - start, dtype=self._dtype, device=values.device)
        self._bounds = (start, stop)
        self.values.copy_(values)


class _PartBlock(Block):
    """One block of the parts."""

    def __init__(
        self,
        start: int,
        stop: int,
        room: Sequence[torch.Tensor],
        decoders: Sequence[Decoder],
        raws: Sequence[Raw],
        num_cut: int,
    ) -> None:
        self.start = start
        self.stop = stop
        self.out, *self.scratch = room
        self._decoders = decoders
        self._raws = raws
        self._num_cut = num_cut

    def load(self, source: int, out: torch.Tensor) -> torch.Tensor:
        """Decode one part."""
        raw = self._raws[source]
        start, stop = (self.start, self.stop) if source < self._num_cut else (raw.start, raw.stop)
        return self._decoders[source].decode(raw, start, stop, out)
