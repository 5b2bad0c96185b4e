"""Random masks that depend on nothing but seed, tensor, model and element."""

from __future__ import annotations

from functools import cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from raymerge.ops.kernels.sparsifiers.sparsifier import Sparsifier, Trim
from raymerge.ops.lazy import delta_loops, np, torch
from raymerge.ops.stored import Stored

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

PAGE_ELEMENTS = 2**16
"""Elements of a tensor that share their keys. Part of the masks' definition; blocks may be cut elsewhere."""

_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST_SHIFT = 14
HASH_SHIFT, HASH_FACTOR = 15, 0xAC4C1B51


class RandomSparsifier(Sparsifier):
    """Keeps each element with the same probability, whatever its value.

    Source: Yu et al. 2024, "Language Models are Super Mario", section 3.2 (the drop of DARE).
    """

    def __init__(self, density: float, *, seed: int, name: str, position: int) -> None:
        """Draw the mask of one model on one tensor.

        Args:
            density: probability that an element is kept, in (0, 1).
            seed: the merge's seed.
            name: the output tensor's name.
            position: index of the model among those that are not the base.
        """
        self._limit = int(density * 2**32)
        self._stream = RandomBits(seed, name, position)

    def trim(self, start: int, delta: torch.Tensor, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Set what the mask drops to zero."""
        self._stream.write(start, spares)
        delta.mul_(_are_below(self._limit, spares))

    def make_trim(self, stored: Stored) -> Trim:
        """Return the keys of the pages."""
        return Trim(delta_loops.RANDOM, word_limit=self._limit, keys=self._stream.list_keys(stored.start, stored.stop))


class RandomBits:
    """32 random bits for each element of a tensor, drawn for one model.

    A fixed table holds a random word for each place in a page; each page has two keys of its own, made from its number
    and from seed, name and position, to turn these words into others. All is integer arithmetic modulo 2^32, so every
    device draws the same bits.

    Source: the table is triple32 of 0, 1, 2, ... (Wellons 2018, "Prospecting for Hash Functions"); a page's bits are
    the first round of a multiplicative hash with a random odd factor (Dietzfelbinger et al. 1997, "A reliable
    randomized algorithm for the closest-pair problem"), one xor-shift and one more product.
    """

    def __init__(self, seed: int, name: str, position: int) -> None:
        self._hasher = blake2b(f"{seed}\0{position}\0{name}".encode(), digest_size=8, person=b"raymerge mask")

    def write(self, start: int, spares: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Write the bits of a block, as int32, into the first bytes of `spares[0]`.

        Args:
            start: index of the block's first element in the tensor.
            spares: two blocks of scratch of the block's size; overwritten.
        """
        stop = start + spares[0].numel()
        if spares[0].device.type == "cpu":
            self._fill(start, *(_numpy_words(spare) for spare in spares))
            return
        pages = range(start // PAGE_ELEMENTS, -(-stop // PAGE_ELEMENTS))
        words, spare = (_words(spare) for spare in spares)
        table = _table(words.device)
        whole = range(-(-start // PAGE_ELEMENTS), stop // PAGE_ELEMENTS)
        if whole:  # at once: a GPU computes faster than it is told what
            keys, factors = zip(*(map(_as_int32, self._keys(page)) for page in whole), strict=True)
            columns = torch.tensor([keys, factors], dtype=torch.int32).to(words.device).unsqueeze(2)
            here = slice(whole[0] * PAGE_ELEMENTS - start, (whole[-1] + 1) * PAGE_ELEMENTS - start)
            shape = len(whole), PAGE_ELEMENTS
            _hash(table, columns[0], columns[1], words[here].view(shape), spare[here].view(shape))
        for page in pages:
            if page not in whole:
                there, here = _cut_page(page, start, stop)
                key, factor = map(_as_int32, self._keys(page))
                _hash(table[there], key, factor, words[here], spare[here])

    def draw(self, start: int, stop: int) -> Words:
        """Return the bits of the elements [start, stop)."""
        bits, shifted = (np.empty(stop - start, np.uint32) for _ in range(2))
        self._fill(start, bits, shifted)
        return bits

    def _fill(self, start: int, bits: Words, shifted: Words) -> None:
        """Write the bits of a block to `bits` on the CPU; `shifted` is overwritten."""
        stop = start + len(bits)
        for page in range(start // PAGE_ELEMENTS, -(-stop // PAGE_ELEMENTS)):
            there, here = _cut_page(page, start, stop)
            _hash_on_cpu(numpy_table()[there], *self._keys(page), bits[here], shifted[here])

    def list_keys(self, start: int, stop: int) -> Words:
        """Return a row of two keys for each page that the elements [start, stop) touch."""
        pages = range(start // PAGE_ELEMENTS, -(-stop // PAGE_ELEMENTS))
        return np.array([self._keys(page) for page in pages], np.uint32)

    def _keys(self, page: int) -> tuple[int, int]:
        """Return two 32-bit keys, the second one odd."""
        hasher = self._hasher.copy()
        hasher.update(page.to_bytes(8, "little"))
        keys = int.from_bytes(hasher.digest(), "little")
        return keys % 2**32, keys >> 32 | 1


def _cut_page(page: int, start: int, stop: int) -> tuple[slice, slice]:
    """Return the overlap of a page and the block [start, stop), in elements of the page and of the block."""
    offset = page * PAGE_ELEMENTS
    first, last = max(start, offset), min(stop, offset + PAGE_ELEMENTS)
    return slice(first - offset, last - offset), slice(first - start, last - start)


def _hash(
    words: torch.Tensor,
    key: torch.Tensor | int,
    factor: torch.Tensor | int,
    bits: torch.Tensor,
    shifted: torch.Tensor,
) -> None:
    """Hash with torch, which has no logical shift: the bits that an arithmetic one brings in are masked out."""
    torch.bitwise_xor(words, key, out=bits).mul_(factor)
    torch.bitwise_right_shift(bits, HASH_SHIFT, out=shifted).bitwise_and_(2 ** (32 - HASH_SHIFT) - 1)
    bits.bitwise_xor_(shifted).mul_(_as_int32(HASH_FACTOR))


def _hash_on_cpu(words: Words, key: int, factor: int, bits: Words, shifted: Words) -> None:
    """Hash with numpy, which is faster for having unsigned integers."""
    np.bitwise_xor(words, np.uint32(key), out=bits)
    np.multiply(bits, np.uint32(factor), out=bits)
    np.right_shift(bits, np.uint32(HASH_SHIFT), out=shifted)
    np.bitwise_xor(bits, shifted, out=bits)
    np.multiply(bits, np.uint32(HASH_FACTOR), out=bits)


def biased_words(bits: torch.Tensor) -> torch.Tensor:
    """Return words less 2^31, in place: signed integers that order as the unsigned words do."""
    return _words(bits).bitwise_xor_(-(2**31))


def _are_below(limit: int, spares: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return 1 where the unsigned words in `spares[0]` are below the limit and 0 elsewhere, in one of the spares."""
    bits, spare = spares
    if bits.device.type != "cpu":
        return torch.lt(biased_words(bits), limit - 2**31, out=spare)

    flags = spare.view(torch.uint8)[: bits.numel()]
    np.less(_numpy_words(bits), np.uint32(limit), out=flags.numpy().view(np.bool_))
    return bits.copy_(flags)


@cache
def numpy_table() -> Words:
    """Return a random word for each place in a page; shared, never written to."""
    words = np.arange(PAGE_ELEMENTS, dtype=np.uint32)
    for shift, factor in _ROUNDS:
        words = (words ^ words >> np.uint32(shift)) * np.uint32(factor)
    return words ^ words >> np.uint32(_LAST_SHIFT)


@cache
def _table(device: torch.device) -> torch.Tensor:
    """Return the table as int32, on a device."""
    return torch.from_numpy(numpy_table().view(np.int32)).to(device)


def _words(scratch: torch.Tensor) -> torch.Tensor:
    """Return as many int32 as there are elements, in the memory of a block of scratch."""
    return scratch.view(torch.int32)[: scratch.numel()]


def _numpy_words(scratch: torch.Tensor) -> Words:
    """Return as many unsigned 32-bit integers as there are elements, in the memory of a block of scratch."""
    return scratch.numpy().view(np.uint32)[: scratch.numel()]


def _as_int32(value: int) -> int:
    """Return the int32 with the low 32 bits of `value`."""
    return (value + 2**31) % 2**32 - 2**31
