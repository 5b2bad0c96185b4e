"""Random masks that depend on nothing but seed, tensor, model and element."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING

from raymerge.ops.sparsifier import Sparsifier

if TYPE_CHECKING:
    import torch

PAGE_ELEMENTS = 2**16
"""Elements of a tensor that share their keys. Part of the masks' definition; blocks may be cut elsewhere."""

_ROUNDS = ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB))
_LAST_SHIFT = 14
_SHIFT, _FACTOR = 15, 0xAC4C1B51


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
        bits, shifted = (_words(spare) for spare in spares)
        table = _table(bits.device)
        hash_words = _hash_words_on_cpu if bits.device.type == "cpu" else _hash_words
        stop = start + bits.numel()
        for page in range(start // PAGE_ELEMENTS, -(-stop // PAGE_ELEMENTS)):
            first = max(start, page * PAGE_ELEMENTS)
            last = min(stop, (page + 1) * PAGE_ELEMENTS)
            words = table[first - page * PAGE_ELEMENTS : last - page * PAGE_ELEMENTS]
            piece = slice(first - start, last - start)
            hash_words(words, *self._keys(page), bits[piece], shifted[piece])

    def _keys(self, page: int) -> tuple[int, int]:
        """Return two 32-bit keys, the second one odd."""
        hasher = self._hasher.copy()
        hasher.update(page.to_bytes(8, "little"))
        keys = int.from_bytes(hasher.digest(), "little")
        return keys % 2**32, keys >> 32 | 1


def _hash_words(words: torch.Tensor, key: int, factor: int, bits: torch.Tensor, shifted: torch.Tensor) -> None:
    """Hash with torch, which has no logical shift: the bits that an arithmetic one brings in are masked out."""
    import torch

    torch.bitwise_xor(words, _as_int32(key), out=bits).mul_(_as_int32(factor))
    torch.bitwise_right_shift(bits, _SHIFT, out=shifted).bitwise_and_(2 ** (32 - _SHIFT) - 1)
    bits.bitwise_xor_(shifted).mul_(_as_int32(_FACTOR))


def _hash_words_on_cpu(words: torch.Tensor, key: int, factor: int, bits: torch.Tensor, shifted: torch.Tensor) -> None:
    """Hash with numpy, whose unsigned integers take half the time of torch's signed ones."""
    import numpy as np

    table, out, spare = (tensor.numpy().view(np.uint32) for tensor in (words, bits, shifted))
    np.bitwise_xor(table, np.uint32(key), out=out)
    np.multiply(out, np.uint32(factor), out=out)
    np.right_shift(out, np.uint32(_SHIFT), out=spare)
    np.bitwise_xor(out, spare, out=out)
    np.multiply(out, np.uint32(_FACTOR), out=out)


def _are_below(limit: int, spares: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return 1 where the unsigned words in `spares[0]` are below the limit and 0 elsewhere, in one of the spares."""
    import torch

    words = _words(spares[0])
    if words.device.type != "cpu":
        return torch.lt(words.bitwise_xor_(-(2**31)), limit - 2**31, out=spares[1])
    import numpy as np

    flags = spares[1].view(torch.uint8)[: words.numel()]
    np.less(words.numpy().view(np.uint32), np.uint32(limit), out=flags.numpy().view(np.bool_))
    return spares[0].copy_(flags)


@lru_cache(maxsize=16)
def _table(device: torch.device) -> torch.Tensor:
    """Return a random word for each place in a page, as int32; shared, never written to."""
    import numpy as np
    import torch

    words = np.arange(PAGE_ELEMENTS, dtype=np.uint32)
    for shift, factor in _ROUNDS:
        words = (words ^ words >> np.uint32(shift)) * np.uint32(factor)
    words ^= words >> np.uint32(_LAST_SHIFT)
    return torch.from_numpy(words.view(np.int32)).to(device)


def _words(scratch: torch.Tensor) -> torch.Tensor:
    """Return as many int32 as there are elements, in the memory of a block of scratch."""
    import torch

    return scratch.view(torch.int32)[: scratch.numel()]


def _as_int32(value: int) -> int:
    """Return the int32 with the low 32 bits of `value`."""
    return (value + 2**31) % 2**32 - 2**31
